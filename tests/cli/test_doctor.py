"""moejax doctor: a working set-up passes, a wrong kernel fails, and each check is shown at once."""

import json

import jax
import jax.numpy as jnp
import pytest

from moejax.cli import main
from moejax.moe.dispatch import on_device as local


@pytest.mark.slow
def test_doctor_finds_this_set_up_working(capsys):
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["grouped_matmul=auto"] == "tiled"
    assert rows["check: experts"].startswith("ok, within")
    assert rows["check: training step"].startswith("ok on mesh data 8")


def test_doctor_names_each_check_before_it_and_shows_it_after_it(capsys, monkeypatch):
    seen = []

    def ends_with(found):
        def check():
            seen.append(capsys.readouterr())
            return found

        return check

    monkeypatch.setattr("moejax.cli.verbs.doctor.check_grouped_matmul", lambda name: "ok")
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_experts", ends_with("ok, all"))
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_training_step", ends_with("ok"))
    assert main(["doctor"]) == 0
    before, during = seen
    after = capsys.readouterr()
    assert "jaxlib" in before.out and "grouped_matmul=tiled: ok" in before.out
    assert before.err.endswith("checking experts ...\n")
    assert during.err == "checking training step ...\n"
    assert during.out == "experts: ok, all\n" and after.out == "training step: ok\n"


def test_doctor_compares_products_at_the_full_precision_of_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "moejax.cli.verbs.doctor.check_grouped_matmul",
        lambda name: seen.append(jax.config.jax_default_matmul_precision),
    )
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_experts", lambda: "ok")
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_training_step", lambda: "ok")
    assert main(["doctor", "--json"]) == 0
    assert set(seen) == {"highest"} and len(seen) == 4  # every grouped product that runs here


def test_doctor_fails_when_a_kernel_is_wrong(capsys, monkeypatch):
    from moejax.kernels.grouped_matmul import IMPLEMENTATIONS

    ragged = IMPLEMENTATIONS["ragged"]

    def wrong_values(x, *others):
        return 2 * ragged(x, *others)

    def wrong_gradient(x, *others):
        # The root of zero adds nothing to the value and NaN to the gradient.
        return ragged(x, *others) + 0 * jnp.sqrt(0 * x.sum())

    monkeypatch.setattr("moejax.cli.verbs.doctor.check_training_step", lambda: "ok")
    for kernel in (wrong_values, wrong_gradient):
        monkeypatch.setitem(IMPLEMENTATIONS, "tiled", kernel)
        assert main(["doctor", "--json"]) == 1
        captured = capsys.readouterr()
        assert "grouped_matmul=tiled failed" in captured.err
        rows = json.loads(captured.out)
        assert "differs from the reference" in rows["check: grouped_matmul=tiled"]


def test_doctor_fails_when_the_experts_in_one_pass_are_wrong(capsys, monkeypatch):
    real = local.feed_forward
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_training_step", lambda: "ok")
    monkeypatch.setattr("moejax.cli.verbs.doctor.check_grouped_matmul", lambda name: "ok")
    monkeypatch.setattr(local, "feed_forward", lambda *a, **k: 2 * real(*a, **k))
    assert main(["doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert "differs from the reference" in rows["check: experts"]
