"""Weights in blocks of few bits against loops, and models that are published so."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.files.weights import Weights
from moejax.interop.hf.load import load_model
from moejax.interop.hf.places import named_arrays
from moejax.training.state import split_model

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8]}

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def save_raw(path, tensors):
    """Writes a safetensors file with types that the library does not write from NumPy."""
    types = {"float32": "F32", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16"}
    header, data, offset = {}, b"", 0
    for name, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": types[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(content)],
        }
        offset += len(content)
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def mxfp4_number(byte, position, exponent):
    """The number in a half of a byte: sign, two bits of exponent, one of fraction."""
    code = (byte >> 4) if position else (byte & 15)
    sign = -1.0 if code & 8 else 1.0
    return sign * VALUES[code & 7] * 2.0 ** (int(exponent) - 127)


def test_numbers_of_four_bits_are_those_of_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    blocks_ERBX = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
    scales_ERB = rng.integers(118, 130, (3, 5, 2), np.uint8)
    tensors = {"gate_up_blocks": blocks_ERBX, "gate_up_scales": scales_ERB}
    save_raw(tmp_path / "model.safetensors", tensors)
    weights = Weights(tmp_path, MXFP4)
    assert list(weights.names) == ["gate_up"]
    source = weights.claim("gate_up")
    expected_ECR = np.zeros((3, 64, 5))
    for expert, row, block, byte in np.ndindex(*blocks_ERBX.shape):
        for position in range(2):
            column = 32 * block + 2 * byte + position
            number = mxfp4_number(
                blocks_ERBX[expert, row, block, byte], position, scales_ERB[expert, row, block]
            )
            expected_ECR[expert, column, row] = number
    assert source.shape == (3, 64, 5)
    np.testing.assert_array_equal(source.read().astype(np.float64), expected_ECR)
    some_ECR = source.read(slice(1, 3)).astype(np.float64)
    np.testing.assert_array_equal(some_ECR, expected_ECR[1:3])


def test_numbers_of_eight_bits_have_the_scale_of_their_block(tmp_path):
    rng = np.random.default_rng(0)
    weight_RC = rng.normal(size=(37, 20)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    save_raw(tmp_path / "model.safetensors", {"w": weight_RC, "w_scale_inv": scales})
    weights = Weights(tmp_path, FP8)
    assert list(weights.names) == ["w"]
    source = weights.claim("w")
    expected_RC = np.zeros((37, 20), np.float32)
    for row, column in np.ndindex(37, 20):
        expected_RC[row, column] = (
            np.float32(weight_RC[row, column]) * scales[row // 16, column // 8]
        )
    np.testing.assert_array_equal(source.read(), expected_RC)
    np.testing.assert_array_equal(source.read(slice(5, 30)), expected_RC[5:30])


def arrays_of(folder):
    _, params, state = split_model(load_model(folder))
    return named_arrays(params) | named_arrays(state)


def assert_same_model(folder, other):
    found, expected = arrays_of(folder), arrays_of(other)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def write_config(folder, family, **keys):
    folder.mkdir()
    published = json.loads((FOLDER / family / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published | keys))


def test_a_model_as_gpt_oss_is_published_is_the_one_of_its_plain_weights(tmp_path):
    rng = np.random.default_rng(0)
    plain, quantized = {}, {}
    for name, tensor in load_file(FOLDER / "gpt_oss" / "model.safetensors").items():
        if not name.endswith("gate_up_proj"):  # other widths of the fixture are no blocks of 32
            plain[name] = quantized[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = rng.integers(120, 128, blocks.shape[:-1], np.uint8)
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        low = np.array([mxfp4_number(byte, 0, 127) for byte in range(256)], np.float32)
        high = np.array([mxfp4_number(byte, 1, 127) for byte in range(256)], np.float32)
        pairs = np.stack([low[blocks], high[blocks]], axis=-1).reshape(*scales.shape, 32)
        scaled = pairs * np.float32(2.0) ** (scales[..., None].astype(np.float32) - 127)
        values = scaled.reshape(experts, rows, columns).swapaxes(1, 2)
        plain[name] = np.ascontiguousarray(values)
    write_config(tmp_path / "plain", "gpt_oss")
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    write_config(tmp_path / "quantized", "gpt_oss", quantization_config=MXFP4)
    save_raw(tmp_path / "quantized" / "model.safetensors", quantized)
    assert_same_model(tmp_path / "quantized", tmp_path / "plain")


def test_a_model_as_deepseek_v3_is_published_is_the_one_of_its_plain_weights(tmp_path):
    rng = np.random.default_rng(0)
    plain, quantized = {}, {}
    for name, tensor in load_file(FOLDER / "deepseek_v3" / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            plain[name] = quantized[name] = tensor
            continue
        weight = tensor.astype(ml_dtypes.float8_e4m3fn)
        shape = (-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 8))
        scales = rng.uniform(0.5, 2, shape).astype(np.float32)
        quantized |= {name: weight, f"{name}_scale_inv": scales}
        repeated = np.repeat(np.repeat(scales, 16, axis=0), 8, axis=1)
        repeated = repeated[: tensor.shape[0], : tensor.shape[1]]
        plain[name] = weight.astype(np.float32) * repeated
    write_config(tmp_path / "plain", "deepseek_v3")
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    write_config(tmp_path / "quantized", "deepseek_v3", quantization_config=FP8)
    save_raw(tmp_path / "quantized" / "model.safetensors", quantized)
    assert_same_model(tmp_path / "quantized", tmp_path / "plain")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq"}, "quant_method=awq, which is not read; mxfp4 and fp8 are"),
        ({"quant_method": "fp8"}, "needs weight_block_size"),
        (FP8 | {"weight_block_size": [8, 8]}, "for blocks of 8 x 8 it must be"),
        (FP8 | {"weight_block_size": 16}, "needs weight_block_size"),
        (FP8 | {"weight_block_size": [0, 8]}, "needs weight_block_size"),
        ("fp8", "quantization_config='fp8' must be an object"),
        (None, "w_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_refused(quantization, words, tmp_path):
    shutil.copyfile(FOLDER / "mixtral" / "config.json", tmp_path / "config.json")
    published = json.loads((tmp_path / "config.json").read_text())
    published["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(published))
    tensors = load_file(FOLDER / "mixtral" / "model.safetensors")
    tensors["w"] = np.ones((32, 8)).astype(ml_dtypes.float8_e4m3fn)
    tensors["w_scale_inv"] = np.ones((2, 1), np.float32)
    save_raw(tmp_path / "model.safetensors", tensors)
    with pytest.raises(HfError, match=words.replace("(", r"\(")):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("weight", "scales", "words"),
    [
        (np.uint8, np.float32, "w has the type U8; in fp8 it must be F8_E4M3"),
        (np.float32, np.float32, "w has the type F32; in fp8 it must be F8_E4M3"),
        (ml_dtypes.float8_e4m3fn, np.uint8, "w_scale_inv has the type U8; in fp8 it must be F32"),
    ],
)
def test_blocks_of_other_types_are_refused(weight, scales, words, tmp_path):
    tensors = {
        "w": np.ones((16, 8)).astype(weight),
        "w_scale_inv": np.ones((1, 1)).astype(scales),
    }
    save_raw(tmp_path / "model.safetensors", tensors)
    with pytest.raises(HfError, match=words):
        Weights(tmp_path, FP8)


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    blocks = np.ones((1, 2, 1, 16), np.uint8)
    tensors = {"w_blocks": blocks, "w_scales": np.full((1, 2, 1), 255, np.uint8)}
    save_raw(tmp_path / "model.safetensors", tensors)
    with pytest.raises(HfError, match="w_scales holds scales that are no number"):
        Weights(tmp_path, MXFP4).claim("w").read()
