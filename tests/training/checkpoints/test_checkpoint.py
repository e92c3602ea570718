"""Checkpoints: strict, complete or absent, opened on any mesh."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing

import jax
import numpy as np
import pytest

from cases.damage import copy_run, damage, ways
from cases.training import make, replace, small_config
from moejax.config import ConfigError
from moejax.training.checkpoints import checkpoint
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.checkpoints.meta import compare_manifests, manifest, seal
from moejax.training.run_directory.layout import check_run_directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with step 0 saved from 8 devices: (config, workdir, arrays)."""
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "tokenizer.json").write_text("{}")
    config = small_config(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    setup = make(config, 8)
    state = setup.init(0)
    with closing(Checkpoints(workdir, setup)) as checkpoints:
        assert checkpoints.save(state)
        assert not checkpoints.save(state)  # it is there already
    return config, workdir, jax.device_get(jax.tree.leaves(state))


def test_a_run_saved_on_eight_devices_opens_on_one(saved):
    config, workdir, expected = saved
    one = make(replace(config, "mesh", data=1, fsdp=1, tensor=1))
    state = Checkpoints(workdir, one, read_only=True).restore()
    for found, saved_array in zip(jax.tree.leaves(state), expected, strict=True):
        np.testing.assert_array_equal(found, saved_array)
        assert len(found.sharding.device_set) == 1


def test_the_model_alone_can_be_restored(saved):
    config, workdir, expected = saved
    step, params, _ = Checkpoints(workdir, make(config, 8), read_only=True).restore_model()
    assert step == 0
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(jax.tree.leaves(make(config, 8).abstract.params))
    expected_params = expected[1 : 1 + len(leaves)]  # the first leaf is the step
    for found, saved_array in zip(leaves, expected_params, strict=True):
        np.testing.assert_array_equal(found, saved_array)


def test_the_manifest_lists_every_array_with_shape_and_dtype(saved):
    config, _, expected = saved
    entries = manifest(make(config, 8).abstract)
    assert len(entries) == len(expected)
    assert entries["params/stacks/0/block/ffn/router/kernel"] == {
        "shape": [2, 32, 4],
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    ("section", "leaves", "message"),
    [
        (
            "moe",
            {"num_experts": 8},
            r"ffn/experts/down is float32\[2, 4, 16, 32\].*but float32\[2, 8, 16, 32\]",
        ),
        ("model", {"tied_embeddings": False}, r"unembedding is absent in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_by_name(saved, section, leaves, message):
    config, workdir, _ = saved
    one_device = replace(config, "mesh", data=1, fsdp=1, tensor=1)
    other = make(replace(one_device, section, **leaves))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(workdir, other, read_only=True).restore()


def test_another_dtype_is_refused():
    saved = {"params/w": {"shape": [2], "dtype": "bfloat16"}}
    with pytest.raises(CheckpointError, match=r"params/w is bfloat16\[2\].*but float32\[2\]"):
        compare_manifests(saved, {"params/w": {"shape": [2], "dtype": "float32"}}, "folder")


def test_arrays_that_another_version_named_differently_are_refused_as_such():
    def entries(*names):
        return {name: {"shape": [2, size], "dtype": "float32"} for size, name in enumerate(names)}

    words = (
        r"folder was saved by a version that names arrays differently: it has params/into_latent, "
        r"and the model has params/latent_down; use the version that trained it"
    )
    with pytest.raises(CheckpointError, match=words):
        compare_manifests(
            entries("params/w", "params/into_latent"),
            entries("params/w", "params/latent_down"),
            "folder",
        )
    with pytest.raises(CheckpointError, match="params/w is absent in the checkpoint"):
        compare_manifests(entries("params/a"), entries("params/w", "params/b"), "folder")


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
    with pytest.raises(
        CheckpointError, match=r"checkpoints/0 cannot be read.*restore it from a copy; no older"
    ):
        Checkpoints(tmp_path / "run", make(config, 8), read_only=True).restore()


def test_an_unfinished_step_does_not_count(saved, tmp_path):
    config, workdir, _ = saved
    shutil.copytree(workdir, tmp_path / "run")
    steps = tmp_path / "run/checkpoints"
    shutil.copytree(steps / "0", steps / "7.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path / "run", make(config, 8), read_only=True)
    assert checkpoints.steps() == [0]
    with pytest.raises(CheckpointError, match=r"holds no step 7; it holds \[0\]"):
        checkpoints.restore(7)


def test_a_failed_save_is_an_error_at_the_next_one_and_at_the_end(tmp_path, monkeypatch):
    def full():
        raise OSError("No space left")

    setup = make(small_config())
    checkpoints = Checkpoints(tmp_path, setup)
    monkeypatch.setattr(checkpoints._manager, "check_for_errors", full)
    for action in (lambda: checkpoints.save(setup.init(0)), checkpoints.close):
        with pytest.raises(
            CheckpointError, match=r"failed \(No space left\); the steps saved before are intact"
        ):
            action()


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with closing(Checkpoints(tmp_path, make(small_config()))) as checkpoints:
        assert checkpoints.restore() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint; train the run first"):
            checkpoints.restore_model()


def test_the_best_checkpoint_outlives_the_newest_in_continued_runs_too(tmp_path):
    config = small_config(train={"keep_checkpoints": 1})
    setup = make(config)
    state = setup.init(0)
    parts = [
        ({0: 3.0, 1: 1.0, 2: 2.0}, [1, 2]),
        ({3: 2.5, 4: None}, [1, 4]),
        ({5: 0.5, 6: 0.6}, [5, 6]),
    ]
    for losses, kept in parts:
        with closing(Checkpoints(tmp_path, setup)) as checkpoints:
            for step, loss in losses.items():
                metrics = None if loss is None else {"eval/loss": loss}
                checkpoints.save(dataclasses.replace(state, step=np.int32(step)), metrics)
        assert Checkpoints(tmp_path, setup, read_only=True).steps() == kept


def test_a_step_before_a_saved_one_is_not_saved_in_silence(tmp_path):
    setup = make(small_config())
    initial = setup.init(0)

    def state(step):
        return dataclasses.replace(initial, step=np.int32(step))

    with closing(Checkpoints(tmp_path, setup)) as checkpoints:
        assert checkpoints.save(state(10))
        assert checkpoints.save(state(20))
        assert not checkpoints.save(state(20))
        message = "holds step 20: step 15 cannot be saved before it"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(state(15))
        checkpoints.drop_after(10)
        assert checkpoints.save(state(15))
        assert checkpoints.steps() == [10, 15]


# Damage
# -------------------------------------------------------------------------------------------------


def copy_of(workdir, tmp_path):
    return copy_run(workdir, tmp_path / "run")


def rewrite_meta(workdir, change, *, is_sealed=True):
    """Replaces the `meta` of step 0 as someone who knew the format could."""
    path = workdir / "checkpoints/0/meta/metadata"
    meta = json.loads(path.read_text())
    del meta["digest"]
    change(meta)
    path.write_text(json.dumps(seal(meta) if is_sealed else meta))


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))]
)
def test_every_damaged_file_of_a_checkpoint_is_refused_or_restored_exactly(saved, tmp_path, part):
    config, workdir, expected = saved
    setup, rng = make(config, 8), np.random.default_rng(0)
    step = workdir / "checkpoints/0"
    files = sorted(path.relative_to(workdir) for path in step.rglob("*") if path.is_file())
    num_refused = 0
    # All ways for the arrays, every third for the other files; of them a quarter.
    tried = []
    for turn, (file, how) in enumerate(itertools.product(files, ways())):
        if turn % 3 == 0 or "ocdbt.process_0/d" in str(file):
            tried.append((file, how))
    for file, how in tried[part::4]:
        copy = copy_of(workdir, tmp_path)
        if not damage(copy / file, how, rng):
            continue
        try:
            state = Checkpoints(copy, setup, read_only=True).restore()
        except CheckpointError as error:
            num_refused += 1
            assert "\n" not in str(error) and str(copy / "checkpoints/0") in str(error), (file, how)
            continue
        for found, saved_array in zip(jax.tree.leaves(state), expected, strict=True):
            np.testing.assert_array_equal(found, saved_array, err_msg=f"{file} {how}")
    assert num_refused > 5


RESTORE_AGAIN_AND_AGAIN = """
import sys
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from cases.training import make, small_config
trainable = make(small_config())
with open(sys.argv[1] + "/checkpoints/0/model/" + sys.argv[2], "r+b") as file:
    good = file.read()
    for place in range(0, len(good), len(good) // 20):
        file.seek(0)
        file.write(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        file.flush()
        try:
            Checkpoints(sys.argv[1], trainable, read_only=True).restore()
        except CheckpointError:
            print("refused")
"""


@pytest.mark.parametrize(
    "name",
    ["manifest.ocdbt", pytest.param("array_metadatas/process_0", marks=pytest.mark.slow)],
)
def test_only_the_first_of_several_failed_reads_is_reported(saved, tmp_path, name):
    workdir = copy_of(saved[1], tmp_path)
    command = [sys.executable, "-c", RESTORE_AGAIN_AND_AGAIN, str(workdir), name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.count("refused") > 10
    assert done.stderr == ""


def test_a_flipped_bit_of_an_array_is_answered_with_array_and_checkpoint(saved, tmp_path):
    config, workdir, expected = saved
    copy = copy_of(workdir, tmp_path)
    files = (copy / "checkpoints/0/model/ocdbt.process_0/d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    answers = []
    for place in np.linspace(100, len(content) - 100, 8).astype(int):
        flipped = bytearray(content)
        flipped[place] ^= 1
        largest.write_bytes(flipped)
        try:
            _, params, _ = Checkpoints(copy, make(config, 8), read_only=True).restore_model()
        except CheckpointError as error:
            answers.append(str(error))
        else:  # nothing refers to that byte
            for a, b in zip(jax.tree.leaves(params), expected[1:], strict=False):
                np.testing.assert_array_equal(a, b)
    assert len(answers) >= 3
    pattern = r"checkpoints/0 (is damaged \(params/\w+|cannot be read at params/\w+)"
    for answer in answers:
        assert re.search(pattern, answer), answer


def test_the_way_to_an_older_step_is_a_command_and_deletes_nothing(tmp_path):
    setup = make(small_config())
    state = setup.init(0)
    with closing(Checkpoints(tmp_path, setup)) as checkpoints:
        for step in (10, 20):
            checkpoints.save(dataclasses.replace(state, step=np.int32(step)))
    (tmp_path / "checkpoints/20/meta/metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="go on from step 10 after: ") as caught:
        Checkpoints(tmp_path, setup, read_only=True).restore()
    command = str(caught.value).split("after: ")[1]
    assert command == f"mv {tmp_path}/checkpoints/20 {tmp_path}/damaged-20"
    subprocess.run(command, shell=True, check=True)
    assert int(Checkpoints(tmp_path, setup, read_only=True).restore().step) == 10


def test_a_checkpoint_copied_under_another_number_is_refused(saved, tmp_path):
    config, workdir, _ = saved
    copy = copy_of(workdir, tmp_path)
    shutil.copytree(copy / "checkpoints/0", copy / "checkpoints/30")
    message = r"checkpoints/30 is damaged \(it holds step 0: the folder was renamed"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(copy, make(config, 8), read_only=True).restore()


def test_a_folder_of_a_step_that_is_no_checkpoint_is_not_passed_over(saved, tmp_path):
    config, workdir, _ = saved
    copy = copy_of(workdir, tmp_path)
    (copy / "checkpoints/40").write_text("")
    checkpoints = Checkpoints(copy, make(config, 8), read_only=True)
    if checkpoints.steps() == [0]:
        with pytest.raises(CheckpointError, match="checkpoints/40 is damaged"):
            checkpoints.restore()
        assert int(checkpoints.restore(0).step) == 0
    else:
        with pytest.raises(CheckpointError, match="checkpoints/40 cannot be read"):
            checkpoints.restore()


def test_missing_rights_are_no_damage(saved, tmp_path, monkeypatch):
    config, workdir, _ = saved

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint, "read_meta", refuse)
    message = r"cannot be read .*Permission denied.*the right to read"
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoints(workdir, make(config, 8), read_only=True).restore()
    assert "damaged" not in str(caught.value) and "mv " not in str(caught.value)


def test_a_checkpoint_without_digests_is_restored_with_a_warning(saved, tmp_path, caplog):
    config, workdir, expected = saved
    copy = copy_of(workdir, tmp_path)

    def make_old(meta):
        for key in ("step", "digests", "metrics"):
            del meta[key]

    rewrite_meta(copy, make_old, is_sealed=False)
    state = Checkpoints(copy, make(config, 8), read_only=True).restore()
    for a, b in zip(jax.tree.leaves(state), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    messages = [record.message for record in caplog.records if record.name == "moejax"]
    assert messages == [
        f"{copy}/checkpoints/0 was saved without digests by an earlier version: "
        "its arrays were not verified"
    ]


def test_a_checkpoint_of_another_configuration_is_refused_by_its_own_record(saved):
    config, workdir, _ = saved
    other = make(replace(config, "optimizer", learning_rate=0.5), 8)
    message = r"trained with optimizer.learning_rate=0.003, not 0.5; restore config.json"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(workdir, other, read_only=True).restore()
    message = r"optimizer.learning_rate=0.003, not 0.5; give --config.optimizer.learning_"
    with pytest.raises(ConfigError, match=message):
        check_run_directory(workdir, other.config)  # which has no config.json


def test_a_save_that_left_nothing_readable_does_not_count(tmp_path, monkeypatch):
    setup = make(small_config())
    checkpoints = Checkpoints(tmp_path, setup)
    finish = checkpoints._manager.wait_until_finished

    def lose_the_tree():
        finish()
        for path in tmp_path.glob("checkpoints/*/model/manifest.ocdbt"):
            path.unlink()

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", lose_the_tree)
    checkpoints.save(setup.init(0))
    message = r"checkpoints/0 was saved and cannot be read \(model lacks params/embed"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.wait()


@pytest.mark.parametrize("name", ["p[1]", "p*", "p?"])
def test_a_folder_below_which_orbax_finds_nothing_is_refused_at_the_start(tmp_path, name):
    message = r"checkpoints cannot be saved below a folder whose name has [\[*?]"
    with pytest.raises(ConfigError, match=message):
        check_run_directory(tmp_path / name / "run", small_config())


def test_a_name_that_is_not_utf_8_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="not the same name in UTF-8 as in this locale"):
        check_run_directory(tmp_path / os.fsdecode(b"caf\xe9"), small_config())
