"""The loop learns, resumes bit for bit, stops on signals, and skips steps that are not finite."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cases.training import (
    case_config,
    initial_state,
    make,
    packed_batch,
    replace,
    share_programs,
    small_config,
)
from moejax.config import ConfigError, Knobs
from moejax.data import prepare
from moejax.training import loop
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.meta import saved_steps
from moejax.training.health.nonfinite import NonFiniteError, locate, nonfinite_error
from moejax.training.health.telemetry import NORMS
from moejax.training.loop import train
from moejax.training.router_state import active_top_k_at
from moejax.training.run_directory.routing_log import read_routing
from moejax.training.step import make_train_step, put_batch

REPOSITORY = Path(__file__).parents[2]


def tiny(tmp_path, **sections):
    """A small run; all in this process share the prepared rows."""
    train_leaves = {
        "num_steps": 20,
        "log_every": 5,
        "eval_every": 10,
        "checkpoint_every": 5,
        "batch_size": 8,
        "logit_z_weight": 1e-2,
    }
    own = {
        "train": train_leaves | sections.get("train", {}),
        "data": {"directory": str(tmp_path.parent / "data")} | sections.get("data", {}),
        "optimizer": {"learning_rate": 1e-2} | sections.get("optimizer", {}),
    }
    return small_config(**sections | own)


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(lines):
    """Lines of metrics without what is measured in seconds."""
    kept = []
    for line in lines:
        kept.append({key: value for key, value in line.items() if not key.startswith("perf/")})
    return kept


def assert_equal_leaves(found, expected):
    for array, expected_array in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(array, expected_array)


def arrays(workdir, config, step):
    checkpoints = Checkpoints(workdir, make(config), read_only=True)
    return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore(step))]


@pytest.fixture(scope="module")
def programs():
    """What `straight` compiled, for other runs of its configuration: see `share_programs`."""
    return {}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, programs):
    """Twenty steps without interruption: (config, workdir, result)."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny(folder)
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch, programs)
        return config, folder / "run", train(config, folder / "run")


def command(config, workdir, *arguments):
    """A subprocess that trains `config` in `workdir` as the command line would."""
    leaves = [f"--config.{section}.{name}={value}" for section, name, value in arguments]
    return [
        sys.executable,
        "-m",
        "moejax",
        "train",
        f"--config={config}",
        f"--workdir={workdir}",
        "--noreport",
        *leaves,
    ]


def environment():
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def test_training_lowers_the_loss_and_fills_the_run_directory(straight):
    _, workdir, result = straight
    training = [line for line in lines(workdir) if "loss/lm" in line]
    assert training[-1]["loss/lm"] < training[0]["loss/lm"] - 0.5
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    assert training[-1]["tokens"] > 0
    assert result.step == 20 and result.stopped_by is None
    evaluations = [line for line in lines(workdir) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20]
    assert evaluations[-1]["eval/loss"] == pytest.approx(result.evaluation.loss)
    for name in ("config.json", "tokenizer.json", "tensorboard", "checkpoints/20"):
        assert (workdir / name).exists()
    assert json.loads((workdir / "config.json").read_text())["parameters"]["total"] > 0


def test_logged_losses_are_apart_and_add_up(straight):
    config, workdir, _ = straight
    line = next(line for line in lines(workdir) if "loss/lm" in line)
    parts = line["loss/lm"] + line["loss/balance_weighted"] + line["loss/z_weighted"]
    parts += line["loss/logit_z_weighted"]
    assert line["loss/total"] == pytest.approx(parts, rel=1e-5)
    logit_z = config.train.logit_z_weight * line["loss/logit_z"]
    assert line["loss/logit_z_weighted"] == pytest.approx(logit_z, rel=1e-5) and logit_z > 0
    balance = config.moe.balance_weight * config.num_moe_layers * line["loss/balance"]
    assert line["loss/balance_weighted"] == pytest.approx(balance, rel=1e-5)


def test_the_routing_log_counts_every_choice(straight):
    config, workdir, _ = straight
    history = read_routing(workdir)
    np.testing.assert_array_equal(history.steps, [5, 10, 15, 20])
    assert history.counts_SNE.shape == (4, 2, 4)
    np.testing.assert_allclose(history.probs_SNE.sum(axis=-1), 1, rtol=1e-4)
    assert (history.counts_SNE.sum(axis=-1) % config.moe.top_k == 0).all()


def test_evaluation_counts_every_target_of_the_split(straight):
    config, _, result = straight
    corpus = prepare(config.data)
    assert result.evaluation.num_targets == corpus.num_tokens["validation"]
    nats = result.evaluation.loss * corpus.num_tokens["validation"]
    bits_per_byte = nats / np.log(2) / corpus.num_bytes["validation"]
    assert result.evaluation.bits_per_byte == pytest.approx(bits_per_byte)
    assert result.evaluation.load_NE.sum(axis=1) == pytest.approx(1.0)


def test_a_finished_run_is_evaluated_again_and_not_trained(straight, programs, monkeypatch):
    config, workdir, first = straight
    share_programs(monkeypatch, programs)
    again = train(config, workdir)
    assert again.step == 20 and again.tokens_per_s is None
    assert again.evaluation.loss == first.evaluation.loss


def test_only_the_newest_and_the_best_checkpoints_stay(straight):
    config, workdir, _ = straight
    assert Checkpoints(workdir, make(config), read_only=True).steps() == [15, 20]


def write_recipe(path, config):
    from moejax.config import to_dict

    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"VALUES = {to_dict(config)!r}\n"
        "def get_config(arg=''):\n    return ConfigDict(VALUES)\n"
    )
    return path


def run_to_the_end(recipe, workdir):
    done = subprocess.run(
        command(recipe, workdir), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_killed_with_sigkill_and_resumed_equals_twenty_steps_straight(straight, tmp_path):
    config, _, _ = straight
    recipe = write_recipe(tmp_path / "recipe.py", config)
    killed, other = tmp_path / "run", tmp_path / "straight"
    process = subprocess.Popen(
        command(recipe, killed), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (killed / "checkpoints/10").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "checkpoints/20").exists()
    resumed = run_to_the_end(recipe, killed)
    assert "continuing" in resumed.stderr
    # The same program on one device must give the same bits: compare with a straight run of the
    # same command.
    run_to_the_end(recipe, other)
    assert_equal_leaves(arrays(killed, config, 20), arrays(other, config, 20))
    assert without_times(lines(killed)) == without_times(lines(other))
    counts_SNE = read_routing(killed).counts_SNE
    np.testing.assert_array_equal(counts_SNE, read_routing(other).counts_SNE)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str
)
def test_a_signal_during_training_saves_and_exits_zero(tmp_path, number):
    leaves = {"num_steps": 100_000, "checkpoint_every": 90_000, "eval_every": 0, "log_every": 7}
    recipe = write_recipe(tmp_path / "recipe.py", tiny(tmp_path, train=leaves))
    process = subprocess.Popen(
        command(recipe, tmp_path / "run"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert f"{number.name}: saved step" in errors
    (saved,) = saved_steps(tmp_path / "run")
    assert f"saved step {saved} " in errors
    assert lines(tmp_path / "run")[-1]["step"] == saved  # no metrics are lost


def test_an_evaluation_that_a_signal_ends_is_made_up_for(straight, programs, tmp_path, monkeypatch):
    config = tiny(tmp_path)
    assert config == straight[0]
    share_programs(monkeypatch, programs)
    real = loop.evaluate

    def signalled(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", signalled)
        result = train(config, tmp_path / "run")
    assert (result.step, result.stopped_by, result.evaluation) == (10, "SIGTERM", None)
    assert 10 in Checkpoints(tmp_path / "run", make(config), read_only=True).steps()
    assert not any("eval/loss" in line for line in lines(tmp_path / "run"))
    # Run again, it is made up for: the metrics are those of a run without interruption.
    train(config, tmp_path / "run")
    assert evaluations(tmp_path / "run") == pytest.approx(evaluations(straight[1]))


def evaluations(workdir):
    return {line["step"]: line["eval/loss"] for line in lines(workdir) if "eval/loss" in line}


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tmp_path, monkeypatch):
    config = tiny(tmp_path, train={"max_nonfinite_steps": 3, "checkpoint_every": 1})
    bad = dataclasses.replace(Knobs.from_config(config), z_weight=jax.numpy.float32(np.nan))
    monkeypatch.setattr(loop.Knobs, "from_config", lambda config: bad)
    message = (
        r"3 steps in a row, from step 1 on.*the gradient of .*"
        r"none of these steps changed the par.*learning_rate"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(config, tmp_path / "run")
    last = saved_steps(tmp_path / "run")[-1]
    initial = jax.tree.leaves(make(config).init(0))
    # All but the counters is as it was.
    assert_equal_leaves(arrays(tmp_path / "run", config, last)[1:-2], initial[1:-2])


def test_the_first_layer_with_a_value_that_is_not_finite_is_named():
    config = small_config(model={"num_layers": 3}, moe={"first_dense": 1})
    setup = make(config)
    batch = put_batch(packed_batch(config), setup)
    with jax.set_mesh(setup.mesh):
        state = initial_state(setup)
        knobs = Knobs.from_config(config)
        # Everything before it is finite.
        assert locate(setup, state, batch, knobs) == "the state of a router"
        bad_loss = dataclasses.replace(knobs, z_weight=jax.numpy.float32(np.nan))
        place = locate(setup, state, batch, bad_loss)
        assert re.search(r"the gradient of ffn/.* in layer 2", place)
        down = state.params.stacks[1].block.ffn.experts.down
        down[...] = down[...].at[1].set(3e38)
        assert locate(setup, state, batch, knobs) == "layer 2 (output)"
        down[...] = down[...].at[0].set(np.nan)
        parameter = "parameter stacks/1/block/ffn/experts/down"
        assert locate(setup, state, batch, knobs) == parameter


def test_one_step_that_is_not_finite_changes_nothing_but_the_counts():
    config = small_config(moe={"selection_bias": True, "bias_rate": 0.1})
    setup = make(config)
    batch = put_batch(packed_batch(config), setup)
    knobs = Knobs.from_config(config)
    bad_knobs = dataclasses.replace(knobs, z_weight=jax.numpy.float32(np.nan))
    with jax.set_mesh(setup.mesh):
        step = make_train_step(setup)
        state, output_before = step(initial_state(setup), batch, knobs)
        before = jax.device_get(state)
        bad, output_after = step(state, batch, bad_knobs)
        after = jax.device_get(bad)
        good, _ = step(bad, batch, knobs)
    assert_equal_leaves(trained_arrays(after), trained_arrays(before))
    for name in set(output_before.state) - set(NORMS):
        np.testing.assert_array_equal(output_after.state[name], output_before.state[name])
    assert (after.step, after.skipped, after.skipped_in_row) == (2, 1, 1)
    assert (good.skipped, good.skipped_in_row) == (1, 0)
    params = zip(jax.tree.leaves(good.params), jax.tree.leaves(after.params), strict=True)
    assert any((np.asarray(next_array) != array).any() for next_array, array in params)


def trained_arrays(state):
    return state.params, state.router_state, state.opt_state


def test_an_update_that_is_not_finite_is_not_applied_and_is_named():
    config = replace(small_config(), "optimizer", beta1=1.0)  # its bias correction divides 0 by 0
    setup = make(config)
    batch, knobs = put_batch(packed_batch(config), setup), Knobs.from_config(config)
    with jax.set_mesh(setup.mesh):
        before = jax.device_get(initial_state(setup))
        after, output = make_train_step(setup)(initial_state(setup), batch, knobs)
        assert np.isfinite(output.scalars["loss/total"])
        assert np.isfinite(output.scalars["grad_norm"])
        assert (after.step, after.skipped, after.skipped_in_row) == (1, 1, 1)
        error = nonfinite_error(setup, after, batch, knobs, 1, 1)
    assert_equal_leaves(trained_arrays(after), trained_arrays(before))
    assert "the first such value is in the update of embedding" in str(error)


def test_a_scheduled_number_of_experts_follows_the_step_after_a_skipped_one():
    config = case_config("schedules")
    setup = make(config)
    batch, knobs = put_batch(packed_batch(config), setup), Knobs.from_config(config)
    bad = dataclasses.replace(knobs, z_weight=jax.numpy.float32(np.nan))
    with jax.set_mesh(setup.mesh):
        train_step, state = make_train_step(setup), initial_state(setup)
        for step in range(3):
            state, output = train_step(state, batch, bad)
            assert state.skipped == step + 1
            experts = output.routing.assignments_E.sum() / output.routing.num_tokens.sum()
            assert experts == active_top_k_at(config, 4, step)
            leaves = jax.tree.leaves_with_path(state.router_state)
            active = [array for path, array in leaves if "active_top_k" in str(path)]
            expected = active_top_k_at(config, 4, step + 1)
            assert active and all((array == expected).all() for array in active)


def test_a_run_directory_of_another_configuration_is_refused_by_key(straight):
    config, workdir, _ = straight
    message = r"moe.num_experts=4, not 8; give --config.moe.num_experts=4 to"
    with pytest.raises(ConfigError, match=message):
        train(replace(config, "moe", num_experts=8), workdir)


def random_words(seed):
    letters = np.random.default_rng(seed).choice([*"abcdefghijklmnopqrstuvwxyz    "], 20_000)
    return "".join(letters)


def test_a_run_keeps_its_tokenizer_and_refuses_text_that_has_changed(tmp_path):
    text = tmp_path / "a.txt"
    data = {
        "source": "files",
        "files": str(tmp_path / "*.txt"),
        "tokenizer": "bpe",
        "vocab_size": 512,
    }
    text.write_text(random_words(0))
    config = tiny(tmp_path, data=data, train={"num_steps": 2})
    train(config, tmp_path / "run")
    tokenizer = (tmp_path / "run/tokenizer.model").read_bytes()
    text.write_text(random_words(1))
    message = r"the text has changed since.*restore the text, or use another --workdir"
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert (tmp_path / "run/tokenizer.model").read_bytes() == tokenizer
