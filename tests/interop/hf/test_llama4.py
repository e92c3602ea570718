"""Llama 4 beside a model of images, and spellings of its layers that its fixture does not have."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import load_model, read_config
from moejax.interop.hf.save import save_model

TEXT = FOLDER / "llama4_text"
OF_IMAGES = ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")


@pytest.fixture
def beside_images(tmp_path):
    """A folder in the form of the published ones."""
    text = json.loads((TEXT / "config.json").read_text())
    keys = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 16}}
    keys |= {"image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    tensors = load_file(TEXT / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {name: np.ones((4, 4), np.float32) for name in OF_IMAGES}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_the_model_of_text_is_read_and_that_of_images_left_out(beside_images, tmp_path):
    model, text = load_model(beside_images), load_model(TEXT)
    assert model.config == text.config
    np.testing.assert_array_equal(model.unembedding[...], text.unembedding[...])
    with pytest.raises(HfError, match="has a model of images, too; write the text's as llama4_te"):
        save_model(model, tmp_path / "out", "llama4")


def test_only_tensors_of_images_are_left_out(beside_images):
    path = beside_images / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"audio_model.embedding": np.ones(2, np.float32)}, path)
    with pytest.raises(HfError, match=r"no place for: audio_model\.embedding"):
        load_model(beside_images)


def config_with(tmp_path, **keys):
    published = json.loads((TEXT / "config.published.json").read_text()) | keys
    kept = {key: value for key, value in published.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return read_config(tmp_path)[0]


def test_layers_without_positions_chunks_and_experts_are_those_of_the_keys(tmp_path):
    plain = config_with(tmp_path, num_hidden_layers=8, no_rope_layers=[])
    assert plain.attention.rope_layers == "rope, rope, rope, none"
    assert plain.attention.chunk_layers == "chunk, chunk, chunk, full"
    assert plain.moe_layers == (1, 3, 5, 7) and plain.moe.every == 2
    listed = config_with(
        tmp_path,
        moe_layers=[0, 3],
        no_rope_layers=[1, 0, 1, 0],
        layer_types=["full_attention", "chunked_attention"] * 2,
        attn_temperature_tuning=0,
        use_qk_norm=False,
    )
    assert listed.moe_layers == (0, 3)
    assert listed.attention.rope_layers == "rope, none"
    assert listed.attention.chunk_layers == "full, chunk"
    assert listed.attention.temperature == 0 and listed.attention.qk_norm == "none"
    everywhere = config_with(tmp_path, no_rope_layers=[1] * 4)
    assert everywhere.attention.qk_norm_layers == "all" and everywhere.attention.temperature == 0
    full = config_with(tmp_path, layer_types=["full_attention"] * 4)
    assert full.attention.chunk == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types="),
        ({"layer_types": ["sliding_attention"] * 4}, "must name chunked_attention or full_att"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers=[1, 1] must have a number for each layer"),
        ({"moe_layers": []}, "no layer has experts"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not implemented"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(tmp_path, keys, words):
    with pytest.raises(HfError) as caught:
        config_with(tmp_path, **keys)
    assert words in str(caught.value)


def test_what_has_other_options_is_written_and_read_back(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TEXT / name, tmp_path / name)
    config_with(
        tmp_path,
        no_rope_layers=[1, 0, 0, 1],
        layer_types=["full_attention"] * 4,
        attn_temperature_tuning=False,
        use_qk_norm=False,
    )
    model = load_model(tmp_path)
    save_model(model, tmp_path / "out", "llama4_text")
    assert read_config(tmp_path / "out")[0] == model.config
