"""What a step holds at the least, and the refusal of what cannot fit."""

import time
from pathlib import Path

import jax
import pytest

from cases.config import nested
from cases.training import small_config
from moejax.cli import main
from moejax.config import ConfigError, resolve
from moejax.planning import memory
from moejax.planning.memory import (
    MOMENTS,
    check_memory,
    device_memory,
    estimate_memory,
    host_memory,
)
from moejax.sharding import make_mesh
from moejax.training.state import make_train_setup

RECIPE = f"--config={Path(__file__).parents[2] / 'configs/debug.py'}"

ABSURD = [
    {"moe.num_experts": 10**9},
    {"model.d_model": 1_000_000},
    {"data.seq_len": 100_000_000},
    {"train.batch_size": 2**30},
    {"moe.d_expert": 2**31 - 1},
    {"model.num_layers": 10_000, "model.d_model": 65_536},
    {"moe.router": "soft", "moe.allow_noncausal": True, "moe.slots_per_expert": 2**31 - 1},
]


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_parameters_moments_and_gradients_are_those_of_the_state():
    config = small_config(mesh={"data": 1})
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    parameters = num_bytes(setup.abstract.params)
    optimizer_state = num_bytes(setup.abstract.opt_state)
    found = estimate_memory(config, 1)
    assert found.parameters == found.gradients == parameters
    assert found.moments == pytest.approx(optimizer_state, abs=16)  # which holds a count, too
    tokens = 8 * 16
    assert found.logits == 4 * tokens * config.vocab_size and found.batch == 17 * tokens
    large = small_config(
        mesh={"data": 1},
        data={"tokenizer": "bpe", "vocab_size": 2**16},
        train={"batch_size": 16},
    )
    assert estimate_memory(large, 1).logits == 4 * 2**23  # half of them at a time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_no_more_than_those_of_the_optimizer(name, dtype):
    config = small_config(mesh={"data": 1}, optimizer={"name": name, "moments_dtype": dtype})
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    found = estimate_memory(config, 1).moments
    held = num_bytes(setup.abstract.opt_state)
    assert held / 2 < found <= held or (name == "adafactor" and found == 0)


def test_what_the_mesh_splits_is_split():
    one_device = {"data": 1}
    alone = estimate_memory(small_config(mesh=one_device), 1)
    experts = estimate_memory(small_config(mesh=one_device | {"expert": 4}), 4)
    fsdp = estimate_memory(small_config(mesh=one_device | {"fsdp": 4}), 4)
    assert fsdp.parameters == alone.parameters // 4
    assert fsdp.parameters < experts.parameters < alone.parameters
    assert experts.logits == alone.logits // 4 and experts.activations == alone.activations // 4
    accumulated = small_config(mesh=one_device, train={"accumulation": 2})
    halves = estimate_memory(accumulated, 1)
    assert halves.logits == alone.logits // 2 and halves.batch == alone.batch


@pytest.mark.parametrize("changes", ABSURD, ids=lambda changes: next(iter(changes)))
def test_an_absurd_size_is_refused_in_one_line_at_once(changes):
    config = resolve(nested({"mesh.data": 1} | changes))
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        check_memory(config, jax.devices()[:1])
    assert time.perf_counter() - started < 2  # with types checked at every call; without, 0.02
    message = str(caught.value)
    assert "\n" not in message and "a step needs at least" in message
    for part in (
        "parameters",
        "moments",
        "gradients",
        "batch",
        "activations",
        "logits",
        "train.check_memory=False",
    ):
        assert part in message


def test_the_check_can_be_switched_off_and_what_fits_is_not_refused():
    absurd = {"moe.num_experts": 10**9, "mesh.data": 1}
    check_memory(resolve(nested(absurd | {"train.check_memory": False})), jax.devices()[:1])
    check_memory(small_config(), jax.devices())


def test_devices_of_the_host_share_its_memory_and_others_have_their_own(monkeypatch):
    config = small_config(mesh={"data": -1})
    needed = estimate_memory(config, 8).total
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * needed)
    check_memory(config, jax.devices())
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * needed - 1)
    message = "each of 8 devices that share the memory of this machine"
    with pytest.raises(ConfigError, match=message):
        check_memory(config, jax.devices())


def test_an_accelerator_says_what_it_has_or_nothing_is_refused():
    assert device_memory(lambda: {"bytes_limit": 5}) == 5
    assert device_memory(lambda: {}) is device_memory(lambda: None) is None

    def fail():
        raise NotImplementedError

    assert device_memory(fail) is None


def test_the_limit_of_a_container_counts(tmp_path):
    of_machine = host_memory(limits=())
    assert of_machine is not None and of_machine > 10**8
    unlimited, limited, absent = tmp_path / "max", tmp_path / "limit", tmp_path / "absent"
    unlimited.write_text("max\n")
    limited.write_text("1000000\n")
    assert host_memory(limits=[str(unlimited), str(absent)]) == of_machine
    assert host_memory(limits=[str(unlimited), str(limited)]) == 10**6


def test_train_and_doctor_refuse_it_before_anything_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["train", f"--workdir={tmp_path / 'run'}"], ["doctor"]):
        assert main([*words, RECIPE, "--config.moe.num_experts=1000000000"]) == 2
        error = capsys.readouterr().err.strip()
        assert "a step needs at least" in error and "\n" not in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_a_sweep_refuses_the_arm_that_cannot_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", RECIPE, f"--dir={tmp_path / 'sweep'}", "moe.num_experts=4,1000000000"]
    assert main(command) == 2
    assert "moe.num_experts=1000000000): a step needs at least" in capsys.readouterr().err
