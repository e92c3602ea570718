"""A tensor whose rows are several arrays of ours: queries, keys and values of DBRX."""

import math

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from cases.hf import FOLDER
from moejax.interop.hf import pieces
from moejax.interop.hf.conversion import to_hf
from moejax.interop.hf.conversion.to_hf import convert_to_hf
from moejax.interop.hf.conversion.to_run import convert_to_run
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.load import abstract_model, load_model, open_checkpoint
from moejax.interop.hf.places import Part, named_arrays, shapes_of
from moejax.interop.hf.tensors import Tensor, share_rows

NAME = "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight"
FIXTURE = FOLDER / "dbrx"


def test_queries_keys_and_values_are_its_rows_one_after_the_other():
    model = load_model(FIXTURE)
    rows_XD = load_file(FIXTURE / "model.safetensors")[NAME]
    mixer = [block.mixer for block, _ in model.walk()][1]
    heads, kv_heads, head = 4, 2, 8
    parts = np.split(rows_XD, np.cumsum([heads * head, kv_heads * head]))
    for array, part_XD in zip((mixer.query, mixer.key, mixer.value), parts, strict=True):
        by_head_DXA = part_XD.T.reshape(array.shape)
        np.testing.assert_array_equal(array[...], by_head_DXA)


@pytest.mark.parametrize("max_bytes", [1, 10**9])
def test_pieces_of_any_size_read_the_same(max_bytes):
    checkpoint = open_checkpoint(FIXTURE)
    expected = named_arrays(nnx.state(load_model(FIXTURE)))
    _, params, others = abstract_model(checkpoint.config)
    params, others = named_arrays(params), named_arrays(others)
    sources = checkpoint.claim(params, others)
    shapes = shapes_of(params | others)
    found = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    for piece in pieces.pieces_of(checkpoint.config, checkpoint.family, shapes, max_bytes):
        array = found[piece.array]
        array[piece.place] = piece.to_ours(sources, array.dtype)
    for name in ("query", "key", "value"):
        path = f"stacks/0/block/mixer/{name}"
        np.testing.assert_array_equal(found[path], expected[path])


def test_some_rows_of_a_part_are_counted_from_the_first_row_of_the_tensor():
    first, second = share_rows(
        [Tensor("qk", "X D", "query", "X D"), Tensor("qk", "X D", "key", "X D")],
        {"query": (2, 3), "key": (4, 3)},
    )
    assert (first.first_row, first.num_rows) == (0, 6)
    assert (second.first_row, second.num_rows) == (2, 6)
    part = Part("key", (), (4, 3), [second])
    rows = [piece.rows for piece in pieces._rows(part, second, max_bytes=24)]
    assert rows == [slice(2, 4), slice(4, 6)]
    assert [piece.rows for piece in pieces._rows(part, second, math.inf)] == [slice(2, 6)]


def test_its_rows_stay_in_one_file(tmp_path, monkeypatch):
    convert_to_run(FIXTURE, tmp_path / "run")
    monkeypatch.setattr(to_hf, "FILE_BYTES", 6000)
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    tensors = {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        own = load_file(path)
        assert not tensors.keys() & own.keys()
        tensors |= own
    expected = load_file(FIXTURE / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def test_another_number_of_rows_is_refused(tmp_path):
    tensors = load_file(FIXTURE / "model.safetensors")
    tensors[NAME] = tensors[NAME][:-1]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((FIXTURE / "config.json").read_bytes())
    with pytest.raises(HfError, match=rf"{NAME} has shape \(63, 32\); .* must be \(64, 32\)"):
        load_model(tmp_path)
