"""Run directories in the layout of released models."""

import json

import ml_dtypes
import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FAMILIES, FOLDER
from cases.training import small_config
from moejax.interop.hf.conversion import to_hf
from moejax.interop.hf.conversion.to_hf import choose_family, convert_to_hf
from moejax.interop.hf.conversion.to_run import convert_to_run
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config
from moejax.training.checkpoints.checkpoint import CheckpointError
from moejax.training.checkpoints.meta import FILE, OLD_KEYS, read_meta, seal
from moejax.training.checkpoints.streamed import StreamedCheckpoint

of_each = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def run(tmp_path):
    """A run directory with the weights of a small model."""
    convert_to_run(FOLDER / "mixtral", tmp_path / "run")
    return tmp_path / "run"


def tensors_in(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(folder, expected):
    found = tensors_in(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes(), name


@of_each
def test_there_and_back_every_bit_is_the_same(family, tmp_path):
    convert_to_run(FOLDER / family, tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert_same_tensors(tmp_path / "out", load_file(FOLDER / family / "model.safetensors"))
    assert read_config(tmp_path / "out")[0] == read_config(FOLDER / family)[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_types_texts_and_several_files_come_back_as_they_were(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(FOLDER / "mixtral" / "model.safetensors")
    for name in tensors:
        if "gate" not in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, source / "model.safetensors")
    published = json.loads((FOLDER / "mixtral" / "config.json").read_text())
    published |= {"eos_token_id": [7, 8], "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(published))
    (source / "generation_config.json").write_text('{"temperature": 0.25}')
    convert_to_run(source, tmp_path / "run")
    monkeypatch.setattr(to_hf, "FILE_BYTES", 2**16)
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert_same_tensors(tmp_path / "out", tensors)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["eos_token_id"] == [7, 8]
    assert content["torch_dtype"] == "bfloat16"
    generation = (tmp_path / "out" / "generation_config.json").read_text()
    assert json.loads(generation) == {"temperature": 0.25}
    assert load_model(tmp_path / "out").config == load_model(source).config


class Stop(BaseException):
    """What a signal raises."""


def test_an_interrupted_conversion_is_no_model_and_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf, "FILE_BYTES", 2**16)
    out = tmp_path / "out"
    written = []

    def save_some(tensors, path, metadata):
        if len(written) == 5:
            raise Stop
        save_file(tensors, path, metadata)
        written.append(path.name)

    monkeypatch.setattr(to_hf, "num_threads", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "save_file", save_some)
        with pytest.raises(Stop):
            convert_to_hf(run, out)
    with pytest.raises(HfError, match=r"config\.json cannot be read"):
        load_model(out)
    first = list(written)
    written.clear()
    written_later = []

    def save_and_note(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written_later.append(path.name)

    monkeypatch.setattr(to_hf, "save_file", save_and_note)
    convert_to_hf(run, out)
    assert len(first) == 5
    assert set(first).isdisjoint(written_later)
    assert_same_tensors(out, load_file(FOLDER / "mixtral" / "model.safetensors"))


def test_a_damaged_checkpoint_is_not_written(run, tmp_path, monkeypatch):
    read = StreamedCheckpoint.read

    def read_with_damage(self, name, place):
        values = read(self, name, place)
        if name == "params/final_norm/scale":
            values = values.copy()
            values[0] += 1
        return values

    monkeypatch.setattr(StreamedCheckpoint, "read", read_with_damage)
    with pytest.raises(CheckpointError, match="final_norm/scale differs from the digest"):
        convert_to_hf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_array_without_a_digest_is_not_written(run, tmp_path):
    folder = run / "checkpoints" / "0"
    meta = read_meta(folder)
    del meta["digests"]["params/final_norm/scale"], meta["digest"]
    (folder / FILE).write_text(json.dumps(seal(meta)))
    with pytest.raises(CheckpointError, match="final_norm/scale differs from the digest"):
        convert_to_hf(run, tmp_path / "out")


def test_a_checkpoint_of_before_there_were_digests_is_written_with_a_warning(run, tmp_path, caplog):
    folder = run / "checkpoints" / "0"
    meta = read_meta(folder)
    (folder / FILE).write_text(json.dumps({key: meta[key] for key in OLD_KEYS}))
    convert_to_hf(run, tmp_path / "out")
    assert "saved without digests" in caplog.text


def test_a_folder_that_holds_something_is_not_written(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(HfError, match=r"--to_hf=.*holds notes\.txt; name a new folder"):
        convert_to_hf(run, tmp_path / "out")


def test_the_family_is_the_one_asked_for_that_it_was_or_the_first_that_fits():
    config = small_config(
        model={"tied_embeddings": False, "embedding_multiplier": 1.0},
        moe={"router": "softmax_topk", "renormalize": True},
    )
    assert choose_family(config, "", {"model_type": "mixtral"}).model_type == "mixtral"
    assert choose_family(config, "", {}).model_type in ("granitemoe", "mixtral")
    with pytest.raises(HfError, match="--family=mixtrale is not known; the families are"):
        choose_family(config, "mixtrale", {})
    with pytest.raises(HfError, match="does not fit the family olmoe"):
        choose_family(config, "olmoe", {})


def test_a_file_that_was_lost_is_written_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf, "FILE_BYTES", 2**16)
    out = tmp_path / "out"

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "mark_complete", stop)
        with pytest.raises(Stop):
            convert_to_hf(run, out)
    first, second, *_ = sorted((out / "converting").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    convert_to_hf(run, out)
    assert_same_tensors(out, load_file(FOLDER / "mixtral" / "model.safetensors"))


def test_a_kill_at_the_end_is_finished_by_the_same_command(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*args):
        raise Stop

    for name in ("replace_file", "remove_staging"):
        with monkeypatch.context() as patch:
            patch.setattr(to_hf, name, stop)
            with pytest.raises(Stop):
                convert_to_hf(run, out)
    convert_to_hf(run, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_values_beyond_a_type_are_refused_by_name(run, tmp_path, monkeypatch):
    read = StreamedCheckpoint.read

    def read_large(self, name, place):
        values = read(self, name, place)
        return values * 1e6 if name == "params/final_norm/scale" else values

    monkeypatch.setattr(StreamedCheckpoint, "read", read_large)
    with pytest.raises(HfError, match=r"model\.norm\.weight has values beyond float16"):
        convert_to_hf(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
