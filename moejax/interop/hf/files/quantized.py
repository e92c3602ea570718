"""Weights in blocks of few bits with a scale each, as gpt-oss and DeepSeek-V3 are published.

Those of MXFP4 are read as bfloat16, which holds every value exactly; those of FP8, whose scales are
float32, as float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.files.stored import StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
SCALE_INVERSE = "_scale_inv"

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MXFP4_VALUES = np.concatenate([E2M1, -E2M1])
"""The number that each 4 bits stand for: a sign, two bits of exponent, one of fraction.

Source: OCP Microscaling Formats (MX) 1.0, table 5.
"""

EXPONENT_BIAS = 127
"""Of the scales of MXFP4, which are powers of two."""

NO_NUMBER = 255
"""A scale that is not a number, by the same source."""


@runtime_checkable
class Source(Protocol):
    """A tensor that can be read, all of it or some rows."""

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns the tensor, or some of its rows; raises `HfError` for values not finite."""


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """A tensor in blocks of 32 numbers of 4 bits, with a power of two for each block.

    Stored is `[E, R, C / 32, 16]`, two numbers a byte, the lower bits first; the tensor is its
    transpose `[E, C, R]`.

    Attributes:
      blocks: of numbers, uint8.
      scales: exponents, uint8 `[E, R, C / 32]`.
    """

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def dtype(self) -> np.dtype:
        """bfloat16."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[E, C, R]`."""
        experts, rows, num_blocks, block_bytes = self.blocks.shape
        return experts, num_blocks * block_bytes * 2, rows

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns the tensor, or that of some experts."""
        bytes_ERBX = self.blocks.read_raw(rows)
        scales_ERB = self.scales.read_raw(rows)
        if (scales_ERB == NO_NUMBER).any():
            raise HfError(
                f"{self.scales.name} holds scales that are no number; get the files again"
            )
        exponents_ERB = scales_ERB.astype(np.int32) - EXPONENT_BIAS
        pairs_ERBX2 = np.stack([bytes_ERBX & 15, bytes_ERBX >> 4], axis=-1)
        experts, num_rows, num_blocks, block_bytes = bytes_ERBX.shape
        codes_ERBY = pairs_ERBX2.reshape(experts, num_rows, num_blocks, 2 * block_bytes)
        values_ERBY = np.ldexp(MXFP4_VALUES[codes_ERBY], exponents_ERB[..., None])
        values_ERC = values_ERBY.reshape(experts, num_rows, -1)
        values_ECR = values_ERC.swapaxes(1, 2).astype(self.dtype)
        return _finite(self.blocks.name, values_ECR)


@dataclasses.dataclass(frozen=True)
class Fp8:
    """A matrix of float8 (e4m3) with a scale for each block of rows and columns.

    Attributes:
      weight: `[R, C]`.
      scales: float32, one for each block.
      block: rows and columns of a block.
    """

    weight: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[R, C]`."""
        return self.weight.shape

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns the matrix, or some of its rows."""
        num_rows, num_columns = self.shape
        wanted = rows or slice(0, num_rows)
        start, stop, _ = wanted.indices(num_rows)
        block_of_row_R = np.arange(start, stop) // self.block[0]
        block_of_column_C = np.arange(num_columns) // self.block[1]
        scales_RC = self.scales.read()[block_of_row_R][:, block_of_column_C]
        values_RC = self.weight.read(rows).astype(np.float32) * scales_RC
        return _finite(self.weight.name, values_RC)


def join_quantized(stored: Mapping[str, StoredTensor], quantization: Any) -> dict[str, Source]:
    """Returns the tensors of a checkpoint: those of blocks and scales as one.

    Args:
      stored: what is in the files, by name.
      quantization: `quantization_config`; None where weights are plain.

    Raises:
      HfError: another kind of quantisation, or scales that do not fit.
    """
    sources: dict[str, Source] = dict(stored)
    if quantization is None:
        return sources
    if not isinstance(quantization, Mapping):
        raise HfError(f"quantization_config={quantization!r} must be an object")
    method = quantization.get("quant_method")
    if method == "mxfp4":
        for name in [name for name in stored if name.endswith(BLOCKS)]:
            stem = name.removesuffix(BLOCKS)
            _require_free(stem, stored)
            sources[stem] = _mxfp4(stored[name], stored.get(stem + SCALES))
            del sources[name], sources[stem + SCALES]
    elif method == "fp8":
        for name in [name for name in stored if name.endswith(SCALE_INVERSE)]:
            weight = name.removesuffix(SCALE_INVERSE)
            sources[weight] = _fp8(stored.get(weight), stored[name], quantization)
            del sources[name]
    else:
        raise HfError(
            f"quantization_config has quant_method={method}, which is not read; mxfp4 and fp8 are"
        )
    return sources


def _require_free(name: str, stored: Mapping[str, StoredTensor]) -> None:
    if name in stored:
        raise HfError(f"{name} is there as it is and in blocks; get the files again")


def _mxfp4(blocks: StoredTensor, scales: StoredTensor | None) -> Mxfp4:
    is_of_blocks = len(blocks.shape) == 4 and blocks.type == "U8"
    if scales is None or not is_of_blocks or blocks.shape[:-1] != scales.shape:
        raise HfError(f"{blocks.name} has no scales of its shape; get the files again")
    if scales.type != "U8":
        raise HfError(f"{scales.name} has the type {scales.type}; it must be U8")
    return Mxfp4(blocks, scales)


def _fp8(weight: StoredTensor | None, scales: StoredTensor, quantization: Mapping[str, Any]) -> Fp8:
    block: Any = quantization.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2
    if not is_block or not all(type(size) is int and size > 0 for size in block):
        raise HfError(f"{scales.name} needs weight_block_size=[rows, columns] in config.json")
    if weight is None or len(weight.shape) != 2:
        raise HfError(f"{scales.name} belongs to no matrix; get the files again")
    for tensor, kind in ((weight, "F8_E4M3"), (scales, "F32")):
        if tensor.type != kind:
            raise HfError(f"{tensor.name} has the type {tensor.type}; in fp8 it must be {kind}")
    rows, columns = block
    expected = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    if scales.shape != expected:
        raise HfError(
            f"{scales.name} has shape {scales.shape}; for blocks of {rows} x {columns} it must be "
            f"{expected}"
        )
    return Fp8(weight, scales, (rows, columns))


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """Returns values; raises `HfError` if some are not finite."""
    if not np.isfinite(values).all():
        raise HfError(f"{name} holds values that are not finite; get the files again")
    return values
