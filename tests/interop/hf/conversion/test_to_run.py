"""Released models as run directories: what is converted, and what an interruption leaves."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.config import ConfigError
from moejax.inference.load import load_run
from moejax.interop.hf.conversion import to_run
from moejax.interop.hf.conversion.to_run import convert_to_run
from moejax.interop.hf.errors import ConversionInterruptedError, HfError
from moejax.interop.hf.files.stored import StoredTensor
from moejax.interop.hf.load import abstract_model, load_model
from moejax.interop.hf.load import read_config as read_released
from moejax.interop.hf.places import named_arrays
from moejax.locks import LockedError
from moejax.sharding import make_mesh
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.streamed import StreamedCheckpoint
from moejax.training.run_directory.layout import (
    check_not_converted,
    check_run_directory,
    read_config,
)
from moejax.training.state import make_train_setup, split_model


@pytest.fixture
def folder(tmp_path):
    """A copy of a small model."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FOLDER / "mixtral" / name, copy / name)
    return copy


@pytest.fixture
def small_pieces(monkeypatch):
    """Divides even small tensors by rows, and notes every few pieces."""
    monkeypatch.setattr(to_run, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(to_run, "BATCH_BYTES", 2**15)


def restored(workdir):
    """Returns the arrays of a checkpoint by path, as they are restored."""
    config = read_config(workdir)
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(workdir, setup, read_only=True) as checkpoints:
        _, params, state = checkpoints.restore_model()
    return named_arrays(params) | named_arrays(state)


def assert_is_model(workdir, folder):
    """Asserts that a run holds the model of a folder."""
    _, params, state = split_model(load_model(folder))
    expected = named_arrays(params) | named_arrays(state)
    found = restored(workdir)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert not (workdir / "converting").exists()


class Stop(BaseException):
    """What a signal raises."""


def stop_after(monkeypatch, num_pieces):
    """Stops the next conversion after some pieces; returns where the written ones are listed."""
    written = []
    write = StreamedCheckpoint.write

    def write_some(self, name, place, values):
        if num_pieces is not None and len(written) >= num_pieces:
            raise Stop
        write(self, name, place, values)
        written.append(name)

    monkeypatch.setattr(StreamedCheckpoint, "write", write_some)
    return written


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_converted_checkpoint_holds_the_arrays_of_the_model(family, tmp_path, small_pieces):
    convert_to_run(FOLDER / family, tmp_path / "run", command="moejax convert")
    assert_is_model(tmp_path / "run", FOLDER / family)
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["corpus"] is None
    assert content["command"] == "moejax convert"


def test_an_interrupted_conversion_is_no_run_and_goes_on_where_it_stopped(
    folder, tmp_path, small_pieces, monkeypatch
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        first = stop_after(patch, 60)
        with pytest.raises(Stop):
            convert_to_run(folder, workdir)
    assert len(first) >= 60
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_run(workdir)
    with monkeypatch.context() as patch:
        second = stop_after(patch, None)
        convert_to_run(folder, workdir)
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        everything = stop_after(patch, None)
        convert_to_run(folder, whole)
    assert len(everything) - len(first) <= len(second) < len(everything)
    assert sorted(path.name for path in workdir.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    assert_is_model(workdir, folder)


def test_a_conversion_of_changed_files_begins_again(folder, tmp_path, small_pieces, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 60)
        with pytest.raises(Stop):
            convert_to_run(folder, workdir)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    convert_to_run(folder, workdir)
    assert_is_model(workdir, folder)


def test_a_conversion_that_is_stopped_while_it_moves_files_is_finished(
    folder, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(to_run, "write_run_directory", stop)
        with pytest.raises(Stop):
            convert_to_run(folder, workdir)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_run(workdir)
    with monkeypatch.context() as patch:
        written = stop_after(patch, None)
        convert_to_run(folder, workdir)
    assert written == []
    assert_is_model(workdir, folder)


def test_a_conversion_whose_parts_were_lost_begins_again(
    folder, tmp_path, small_pieces, monkeypatch, caplog
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 60)
        with pytest.raises(Stop):
            convert_to_run(folder, workdir)
    data = workdir / "converting" / "checkpoints" / "0" / "model" / "d"
    for path in data.iterdir():
        path.write_bytes(b"")
    convert_to_run(folder, workdir)
    assert "is not what was written; the conversion begins again" in caplog.text
    assert_is_model(workdir, folder)


def test_a_source_that_changes_at_the_end_does_not_matter(folder, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def stop(*args):
        raise Stop

    for name in ("write_run_directory", "remove_staging"):
        with monkeypatch.context() as patch:
            patch.setattr(to_run, name, stop)
            with pytest.raises(Stop):
                convert_to_run(folder, workdir)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors")
    convert_to_run(folder, workdir)
    assert_is_model(workdir, folder)
    with pytest.raises(HfError, match="holds checkpoints; name a new folder"):
        convert_to_run(folder, workdir)


def test_a_disk_that_fails_keeps_what_is_done(folder, tmp_path, small_pieces, monkeypatch):
    workdir = tmp_path / "run"
    read = StoredTensor.read_raw
    calls = []

    def fail(self, rows=None):
        calls.append(self.name)
        if len(calls) > 100:
            raise ConversionInterruptedError("the disk is gone")
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "read_raw", fail)
        with pytest.raises(HfError, match="the disk is gone"):
            convert_to_run(folder, workdir)
    assert (workdir / "converting" / "journal.jsonl").stat().st_size > 1000
    convert_to_run(folder, workdir)
    assert_is_model(workdir, folder)


def test_a_large_model_takes_no_memory_before_it_is_read(monkeypatch):
    config = read_released(FOLDER / "mixtral")[0]
    model = dataclasses.replace(config.model, d_model=2**14, vocab_size=2**20)
    config = dataclasses.replace(config, model=model)
    _, params, _ = abstract_model(config)
    assert named_arrays(params)["embedding"].shape == (2**20, 2**14)
    assert all(isinstance(each, jax.ShapeDtypeStruct) for each in jax.tree.leaves(params))


def test_weights_of_others_are_not_begun_again_at_random(folder, tmp_path):
    workdir = tmp_path / "run"
    convert_to_run(folder, workdir)
    shutil.rmtree(workdir / "checkpoints" / "0")
    with pytest.raises(ConfigError, match="began with the weights of a released model"):
        check_not_converted(workdir)


def test_a_source_in_the_folder_that_is_removed_is_refused(folder, tmp_path):
    inside = tmp_path / "run" / "converting"
    inside.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, inside / name)
    with pytest.raises(HfError, match="is in its folder converting; move it elsewhere"):
        convert_to_run(inside, tmp_path / "run")
    with pytest.raises(HfError, match="holds converting; name a new folder"):
        convert_to_run(folder, tmp_path / "run")
    assert len(list(inside.iterdir())) == 2


def test_training_does_not_begin_where_a_conversion_is_under_way(folder, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(Stop):
        convert_to_run(folder, tmp_path / "run")
    config = load_model(folder).config
    with pytest.raises(ConfigError, match="holds a conversion that is not finished"):
        check_run_directory(tmp_path / "run", config)


def test_weights_that_cannot_be_converted_leave_nothing(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HfError, match=r"model\.norm\.weight holds values that are not finite"):
        convert_to_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_written(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(HfError, match=r"holds notes\.txt; name a new folder"):
        convert_to_run(folder, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_conversion_that_another_process_took_over_writes_no_more(
    folder, tmp_path, small_pieces, monkeypatch
):
    monkeypatch.setattr("moejax.locks.FolderLock._is_taken", lambda self: True)
    with pytest.raises(LockedError):
        convert_to_run(folder, tmp_path / "run")
    journal = tmp_path / "run" / "converting" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1
