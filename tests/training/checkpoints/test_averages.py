"""Averages of weights: a moving one of a run, and the mean of its checkpoints."""

import json

import jax
import numpy as np
import pytest

from cases.training import initial_state, make, packed_batch, small_config
from moejax.cli import main
from moejax.config import Knobs
from moejax.inference.evaluate import evaluate_run
from moejax.inference.load import load_run
from moejax.sharding import make_mesh
from moejax.training.checkpoints.averages import restore_weights
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.loop import train
from moejax.training.packed.train import train_packed
from moejax.training.state import make_train_setup
from moejax.training.step import make_train_step, put_batch

TRAIN = {
    "batch_size": 8, "num_steps": 6, "checkpoint_every": 2, "eval_every": 3, "log_every": 2,
    "keep_checkpoints": 9,
}  # fmt: skip


def config_of(decay=0.5, **train_leaves):
    return small_config(train=TRAIN | {"average_decay": decay} | train_leaves)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averages") / "run"
    train(config_of(), workdir, command="")
    return workdir


def leaves(tree):
    return [np.asarray(array, np.float64) for array in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("num_devices", "mesh"), [(1, {}), (8, {"fsdp": 2, "expert": 4})])
def test_the_moving_average_is_that_of_the_formula_on_any_mesh(num_devices, mesh):
    config = small_config(train=TRAIN | {"average_decay": 0.3}, mesh={"data": 1} | mesh)
    setup = make(config, num_devices)
    state = initial_state(setup)
    expected = leaves(state.params)
    step = make_train_step(setup)
    with jax.set_mesh(setup.mesh):
        for number in range(4):
            batch = put_batch(packed_batch(config, number), setup)
            state, _ = step(state, batch, Knobs.from_config(config))
            kept = min(0.3, (1 + number) / (10 + number))
            new = leaves(state.params)
            expected = [kept * old + (1 - kept) * w for old, w in zip(expected, new, strict=True)]
    for found, wanted in zip(leaves(state.average), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_skipped_step_leaves_the_average_as_it_was():
    config = config_of()
    setup = make(config)
    state = initial_state(setup)
    before = leaves(state.average)
    with jax.set_mesh(setup.mesh):
        batch = put_batch(packed_batch(config), setup)
        knobs = Knobs(**vars(Knobs.from_config(config)) | {"learning_rate": np.float32(np.inf)})
        state, output = make_train_step(setup)(state, batch, knobs)
    assert int(output.scalars["skipped_steps"]) == 1
    for old, new in zip(before, leaves(state.average), strict=True):
        np.testing.assert_array_equal(old, new)


def test_it_is_evaluated_beside_the_weights_and_read_from_the_run(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    evaluated = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    for line in evaluated:
        assert line["eval/average_loss"] != line["eval/loss"]
    for average, key in (("", "eval/loss"), ("moving", "eval/average_loss")):
        _, step, found = evaluate_run(run, average=average)
        assert step == 6 and found.loss == pytest.approx(evaluated[-1][key], rel=1e-5)
    assert load_run(run, average="moving").step == 6


def test_a_run_goes_on_with_its_average(run, tmp_path):
    train(config_of(num_steps=4), tmp_path / "part", command="")
    train(config_of(), tmp_path / "part", command="")
    for one, other in zip(weights(tmp_path / "part"), weights(run), strict=True):
        # The schedule of four steps was another one for the first four.
        assert one.shape == other.shape
    whole = tmp_path / "whole"
    train(config_of(checkpoint_every=6), whole, command="")
    for one, other in zip(weights(whole), weights(run), strict=True):
        np.testing.assert_array_equal(one, other)


def weights(workdir, average="moving", config=None, step=None):
    config = config or config_of()
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(workdir, setup, read_only=True) as checkpoints:
        _, params, _ = restore_weights(checkpoints, step, average)
    return leaves(params)


def test_the_mean_of_checkpoints_is_that_of_their_weights(run):
    saved = {step: weights(run, "", step=step) for step in (2, 3, 4, 6)}
    for found, *parts in zip(weights(run, "3"), saved[3], saved[4], saved[6], strict=True):
        np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-6, atol=1e-7)
    for found, *parts in zip(weights(run, "2", step=4), saved[3], saved[4], strict=True):
        np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-6, atol=1e-7)


def test_arms_of_a_pack_keep_averages_of_their_own(run, tmp_path):
    configs = [config_of(seed=seed) for seed in (0, 1)]
    train_packed(configs, [tmp_path / "0", tmp_path / "1"], command="")
    for one, other in zip(weights(tmp_path / "0"), weights(run), strict=True):
        # Adam divides by the root of small numbers, in which the order of additions shows.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_decay_there_is_no_average(tmp_path):
    config = config_of(decay=0.0)
    train(config, tmp_path, command="")
    line = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()][-1]
    assert "eval/loss" in line and "eval/average_loss" not in line
    with pytest.raises(CheckpointError, match=r"holds no moving average .*average_decay above 0"):
        weights(tmp_path, config=config)


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ("1", "--average=1 must be moving, or a number of checkpoints from 2 on"),
        ("mean", "--average=mean must be moving, or a number"),
        ("9", r"holds 4 checkpoints up to the step, \[2, 3, 4, 6\], and --average=9 needs as many"),
    ],
)
def test_averages_that_cannot_be_are_refused(run, average, message):
    with pytest.raises(CheckpointError, match=message):
        weights(run, average)


def test_the_command_evaluates_and_generates_with_averages(run, capsys):
    assert main(["eval", f"--workdir={run}", "--average=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    options = ["--average=moving", "--max_tokens=2", "--json"]
    assert main(["generate", f"--workdir={run}", *options]) == 0
    assert main(["eval", "--hf=x", "--average=2"]) == 2
