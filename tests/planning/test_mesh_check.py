"""Expert parallelism on a mesh against one device: what is right passes, and errors are found."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import pytest

from moejax.cli import main
from moejax.config import resolve
from moejax.moe.expert_parallel import overflow
from moejax.planning.mesh_check import LOADS, NAMES, check_mesh
from moejax.sharding import make_mesh

RECIPE = "--config=configs/expert_parallel.py"


def found(mesh, **moe):
    config = resolve({"moe": {"num_experts": 8, "top_k": 2, **moe}, "mesh": {"data": 1, **mesh}})
    return check_mesh(config, make_mesh(config))


@pytest.mark.parametrize(
    ("mesh", "moe", "strategy", "kinds"),
    [
        (
            {"fsdp": 2, "expert": 2, "tensor": 2},
            {"exchange": "all_to_all", "exchange_chunks": 2},
            "all_to_all",
            {"all-to-all", "all-gather", "reduce-scatter", "all-reduce"},
        ),
        ({"dcn_expert": 2, "expert": 4}, {}, "two_level", {"all-to-all", "all-reduce"}),
        pytest.param(
            {"data": 2, "expert": 4},
            {"router": "soft", "allow_noncausal": True},
            "ring",
            {"all-gather", "reduce-scatter", "all-reduce"},
            marks=pytest.mark.slow,
        ),
        ({"data": 8}, {}, "gather", {"all-reduce"}),
    ],
)
def test_every_mesh_agrees_with_one_device_and_its_collectives_are_listed(
    mesh, moe, strategy, kinds
):
    check = found(mesh, **moe)
    assert check.strategy == strategy
    assert {row["kind"] for row in check.collectives if row["bytes"]} == kinds
    assert check.worst.keys() == set(itertools.product(LOADS, NAMES))
    assert 0 < max(check.worst.values()) < 1e-5
    chunks = moe.get("exchange_chunks", 1)
    splits = {"fsdp": 1, "expert": 1, "dcn_expert": 1} | mesh
    assert check.shapes["tokens"] == (1, 32 * chunks, 8 * splits["fsdp"])
    assert check.shapes["down"] == (8 // splits["expert"] // splits["dcn_expert"], 8, 8)


def test_choices_that_find_no_room_and_are_forgotten_are_found(monkeypatch):
    monkeypatch.setattr(
        overflow,
        "run_overflow",
        lambda *_, like_1TD: (jnp.zeros_like(like_1TD), jnp.float32(0)),
    )
    check = found({"expert": 8}, exchange="all_to_all")
    even, skewed = LOADS
    of_even = [check.worst[even, name] for name in NAMES]
    of_skewed = [check.worst[skewed, name] for name in NAMES]
    assert min(of_skewed) > 0.1 and max(of_even) > 0  # buffers may overflow for an even load, too


def test_doctor_checks_a_recipe_on_a_mesh_and_fails_if_it_is_wrong(capsys, monkeypatch):
    for check in ("check_training_step", "check_experts"):
        monkeypatch.setattr(f"moejax.cli.verbs.doctor.{check}", lambda: "ok")
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_grouped_matmul", lambda name: "ok")
    kept = []

    def keep(config, mesh):
        kept.append(check_mesh(config, mesh))
        return kept[-1]

    monkeypatch.setattr("moejax.cli.verbs.doctor.check_mesh", keep)
    command = ["doctor", RECIPE, "--mesh=data=2,expert=4"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["check: exchange"].startswith("ok, within") and rows["exchange"] == "all_to_all"
    assert rows["mesh"] == "data 2, fsdp 1, dcn_expert 1, expert 4, context 1, tensor 1"
    assert {"kind", "axis", "count", "bytes"} <= rows["collectives"][0].keys()
    assert {row["axis"] for row in rows["collectives"] if row["kind"] == "all-to-all"} == {"expert"}
    good = kept[0]
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_mesh", lambda config, mesh: good)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "What a device sends" in out and "all-to-all" in out
    for wrong in (0.5, float("nan")):
        bad = dataclasses.replace(good, worst=good.worst | {("even", "output"): wrong})
        monkeypatch.setattr("moejax.cli.verbs.doctor.check_mesh", lambda config, mesh, bad=bad: bad)
        assert main([*command, "--json"]) == 1
        said = json.loads(capsys.readouterr().out)["check: exchange"]
        assert said == f"FAILED: all_to_all differs from one device: output (even) by {wrong:.1e}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mesh=expert=4"], ["--mesh=expert=4", "needs --config"]),
        ([RECIPE, "--mesh=experts=4"], ["'experts=4'", "AXIS=SIZE", "expert", "dcn_expert"]),
        ([RECIPE, "--mesh=expert=four"], ["'expert=four'", "AXIS=SIZE"]),
        ([RECIPE, "--mesh=expert=3"], ["mesh.expert=3", "8 devices"]),
        ([RECIPE, "--config.moe.num_experts=0"], ["no experts", "moe.num_experts=0"]),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error_that_says_why(flags, words, capsys):
    assert main(["doctor", *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
