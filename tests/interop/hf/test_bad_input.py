"""Folders that hold no model that can be loaded: one line each, which names what is wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config


@pytest.fixture
def folder(tmp_path):
    """A copy of a small model, to be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FOLDER / "mixtral" / name, copy / name)
    return copy


def refusal(folder):
    with pytest.raises(HfError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder, **tensors):
    """Replaces tensors by name, in which dots are written as double underscores."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, path)


def split_in_two(folder):
    """Makes two files with an index of the weights."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    file_of = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        file_of |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return file_of


def test_files_with_an_index_are_the_same_model(folder):
    expected = load_model(folder)
    split_in_two(folder)
    found = load_model(folder)
    np.testing.assert_array_equal(found.embedding[...], expected.embedding[...])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "mixtrale", "model_type=mixtrale is not known; the nearest is mixtral"),
        ("num_local_experts", 9, "block_sparse_moe.gate.weight has shape (8, 64); by config.json"),
        ("hidden_size", 60, "model.embed_tokens.weight has shape"),
        ("num_hidden_layers", 2, "no place for: model.layers.2"),
        ("hidden_act", "gelu", "hidden_act='gelu' is not implemented"),
        ("sliding_window", -3, "attention.window=-3"),
        ("attention_sink", True, "has attention_sink=True, which is not implemented"),
        ("num_experts_per_tok", 9, "moe.top_k=9"),
        ("rms_norm_eps", "small", "model.norm_epsilon='small'"),
        ("vocab_size", None, "has no vocab_size"),
        ("num_attention_heads", 0, "config.json: "),
        ("hidden_size", "wide", "config.json: "),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "has partial_rotary_factor=0.5, which is not implemented",
        ),
    ],
)
def test_a_configuration_that_asks_for_something_else_is_refused_by_its_key(
    folder, key, value, words
):
    change_config(folder, **{key: value})
    assert words in refusal(folder)


def test_only_the_layers_that_predict_further_tokens_are_left_out(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FOLDER / "deepseek_v3" / name, tmp_path / name)
    change_config(tmp_path, num_hidden_layers=2)
    assert "no place for: model.layers.2." in refusal(tmp_path)
    change_config(tmp_path, num_nextn_predict_layers=1)
    assert load_model(tmp_path).config.model.num_layers == 2


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(HfError, match=r"config\.json (cannot be read|is damaged)"):
        read_config(folder)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(HfError, match=r"config\.json cannot be read"):
        read_config(tmp_path / "nowhere")


def test_tensors_that_lack_or_are_too_many_or_of_another_shape_are_named(folder):
    change_tensors(folder, model__norm__weight=None)
    assert "has no tensor model.norm.weight" in refusal(folder)
    change_tensors(folder, model__norm__weight=np.ones(63, np.float32))
    assert "model.norm.weight has shape (63,); by config.json it must be (64,)" in refusal(folder)
    change_tensors(folder, model__norm__weight=np.ones(64, np.float32), more=np.ones(1, np.float32))
    assert "no place for: more" in refusal(folder)


def test_weights_that_are_no_numbers_or_of_another_type_are_named(folder):
    bad = np.ones(64, np.float32)
    bad[3] = np.nan
    change_tensors(folder, model__norm__weight=bad)
    assert "model.norm.weight holds values that are not finite" in refusal(folder)
    change_tensors(folder, model__norm__weight=np.ones(64, np.int32))
    assert "model.norm.weight has the type I32" in refusal(folder)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "garbage"])
def test_a_damaged_file_of_weights_is_named(folder, damage):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    damaged = {
        "cut": raw[: len(raw) // 2],
        "header": (2**40).to_bytes(8, "little") + raw[8:],
        "empty": b"",
        "garbage": raw[:8] + b"\xff" * length + raw[8 + length :],
    }
    path.write_bytes(damaged[damage])
    assert "model.safetensors is damaged" in refusal(folder)


def test_tensors_that_overlap_are_refused(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert "model.safetensors is damaged" in refusal(folder)


def test_an_index_that_does_not_describe_the_files_is_refused(folder):
    file_of = split_in_two(folder)
    index = folder / "model.safetensors.index.json"
    name, file = next(iter(file_of.items()))
    other = ({*file_of.values()} - {file}).pop()
    index.write_text(json.dumps({"weight_map": file_of | {name: other}}))
    assert name in refusal(folder)
    index.write_text(json.dumps({"weight_map": file_of | {"absent": file}}))
    assert "says that absent is in" in refusal(folder)
    left_out = {each: where for each, where in file_of.items() if each != name}
    index.write_text(json.dumps({"weight_map": left_out}))
    assert f"{name} is in {file}, and" in refusal(folder)
    index.write_text(json.dumps({"weight_map": file_of | {name: "../elsewhere.safetensors"}}))
    assert "no file beside it" in refusal(folder)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert "is damaged" in refusal(folder)
    index.write_text(json.dumps({"weight_map": file_of}))
    (folder / file).unlink()
    assert f"{file} is missing" in refusal(folder)


def test_a_file_that_the_index_does_not_name_is_refused(folder):
    split_in_two(folder)
    save_file({"more": np.ones(1, np.float32)}, folder / "model-00003-of-00003.safetensors")
    assert "model-00003-of-00003.safetensors is not in" in refusal(folder)


def test_pickles_are_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, which is a pickle" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "has neither model.safetensors nor" in refusal(folder)


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "mixtral"])
@pytest.mark.parametrize("num_layers", [0, -1])
def test_a_number_of_layers_that_is_none_is_refused(family, num_layers, tmp_path):
    shutil.copyfile(FOLDER / family / "config.json", tmp_path / "config.json")
    change_config(tmp_path, num_hidden_layers=num_layers)
    with pytest.raises(HfError, match=r"config\.json: "):
        read_config(tmp_path)


def test_a_key_that_stands_twice_is_refused_by_name(folder):
    path = folder / "config.json"
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{text}, "hidden_size": 64}}')
    assert "hidden_size stands twice" in refusal(folder)


def test_a_tensor_that_stands_twice_is_refused_by_name(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = max(header)
    text = json.dumps(header).removesuffix("}") + f', "{name}": {json.dumps(header[name])}}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :])
    assert f"{name} stands twice" in refusal(folder)
    path.write_bytes(raw)
    file_of = split_in_two(folder)
    name, file = next(iter(file_of.items()))
    text = json.dumps({"weight_map": file_of}).removesuffix("}}") + f', "{name}": "{file}"}}}}'
    (folder / "model.safetensors.index.json").write_text(text)
    assert f"{name} stands twice" in refusal(folder)
