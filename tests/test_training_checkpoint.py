"""Checkpoints: strict, complete or absent, opened on any mesh."""

import dataclasses
import json
import shutil
from contextlib import closing

import jax
import numpy as np
import pytest

from moejax.training.checkpoint import CheckpointError, Checkpoints, compare_manifests, manifest
from training_cases import make, replace, small_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with step 0 saved from 8 devices: (config, workdir, arrays)."""
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "tokenizer.json").write_text("{}")
    config = small_config(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    trainable = make(config, 8)
    state = trainable.init(0)
    with closing(Checkpoints(workdir, trainable)) as checkpoints:
        assert checkpoints.save(state)
        assert not checkpoints.save(state)  # it is there already
    return config, workdir, jax.device_get(jax.tree.leaves(state))


def test_a_run_saved_on_eight_devices_opens_on_one(saved):
    config, workdir, expected = saved
    one = make(replace(config, "mesh", data=1, fsdp=1, tensor=1))
    state = Checkpoints(workdir, one, read_only=True).restore()
    for a, b in zip(jax.tree.leaves(state), expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert len(a.sharding.device_set) == 1


def test_the_model_alone_can_be_restored(saved):
    config, workdir, expected = saved
    step, params, _ = Checkpoints(workdir, make(config, 8), read_only=True).restore_model()
    assert step == 0
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(jax.tree.leaves(make(config, 8).abstract.params))
    for a, b in zip(leaves, expected[1 : 1 + len(leaves)], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_manifest_lists_every_array_with_shape_and_dtype(saved):
    config, _, expected = saved
    entries = manifest(make(config, 8).abstract)
    assert len(entries) == len(expected)
    assert entries["params/stacks/0/block/moe/router/kernel"] == {"shape": [2, 32, 4], "dtype": "float32"}


@pytest.mark.parametrize(
    ("section", "leaves", "message"),
    [
        ("moe", {"num_experts": 8}, r"moe/experts/down is float32\[2, 4, 16, 32\].*but float32\[2, 8, 16, 32\]"),
        ("model", {"tied_embeddings": False}, r"unembedding is absent in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_by_name(saved, section, leaves, message):
    config, workdir, _ = saved
    other = make(replace(replace(config, section, **leaves), "mesh", data=1, fsdp=1, tensor=1))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(workdir, other, read_only=True).restore()


def test_another_dtype_is_refused():
    saved = {"params/w": {"shape": [2], "dtype": "bfloat16"}}
    with pytest.raises(CheckpointError, match=r"params/w is bfloat16\[2\].*but float32\[2\]"):
        compare_manifests(saved, {"params/w": {"shape": [2], "dtype": "float32"}}, "folder")


def test_another_tokenizer_is_refused(saved, tmp_path):
    config, workdir, _ = saved
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        Checkpoints(tmp_path / "run", make(config, 8), read_only=True).restore()


def test_a_damaged_checkpoint_is_refused_with_the_remedy(saved, tmp_path):
    config, workdir, _ = saved
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/0/model")
    with pytest.raises(CheckpointError, match=r"checkpoints/0 cannot be read.*restore it from a copy; no older"):
        Checkpoints(tmp_path / "run", make(config, 8), read_only=True).restore()


def test_an_unfinished_step_does_not_count(saved, tmp_path):
    config, workdir, _ = saved
    shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/0", tmp_path / "run/checkpoints/7.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path / "run", make(config, 8), read_only=True)
    assert checkpoints.steps() == [0]
    with pytest.raises(CheckpointError, match=r"holds no step 7; it holds \[0\]"):
        checkpoints.restore(7)


def test_a_failed_save_is_an_error_at_the_next_one_and_at_the_end(tmp_path, monkeypatch):
    def full():
        raise OSError("No space left")

    trainable = make(small_config())
    checkpoints = Checkpoints(tmp_path, trainable)
    monkeypatch.setattr(checkpoints._manager, "check_for_errors", full)
    for action in (lambda: checkpoints.save(trainable.init(0)), checkpoints.close):
        with pytest.raises(CheckpointError, match=r"failed \(No space left\); the steps saved before are whole"):
            action()


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with closing(Checkpoints(tmp_path, make(small_config()))) as checkpoints:
        assert checkpoints.restore() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint; train the run first"):
            checkpoints.restore_model()


def test_the_best_checkpoint_outlives_the_newest_also_where_the_run_was_continued(tmp_path):
    config = small_config(train={"keep_checkpoints": 1})
    trainable = make(config)
    state = trainable.init(0)
    for losses, kept in (({0: 3.0, 1: 1.0, 2: 2.0}, [1, 2]), ({3: 2.5, 4: None}, [1, 4]), ({5: 0.5, 6: 0.6}, [5, 6])):
        with closing(Checkpoints(tmp_path, trainable)) as checkpoints:
            for step, loss in losses.items():
                metrics = None if loss is None else {"eval/loss": loss}
                checkpoints.save(dataclasses.replace(state, step=np.int32(step)), metrics)
        assert Checkpoints(tmp_path, trainable, read_only=True).steps() == kept


def test_a_step_before_a_saved_one_is_not_saved_in_silence(tmp_path):
    trainable = make(small_config())
    state = trainable.init(0)
    with closing(Checkpoints(tmp_path, trainable)) as checkpoints:
        for step in (10, 20):
            assert checkpoints.save(dataclasses.replace(state, step=np.int32(step)))
        assert not checkpoints.save(dataclasses.replace(state, step=np.int32(20)))
        with pytest.raises(CheckpointError, match="holds step 20: step 15 cannot be saved before it"):
            checkpoints.save(dataclasses.replace(state, step=np.int32(15)))
        checkpoints.drop_after(10)
        assert checkpoints.save(dataclasses.replace(state, step=np.int32(15)))
        assert checkpoints.steps() == [10, 15]
