"""The grouped product by the kernels of tokamax, an optional package (extra `tokamax`).

They are written in Triton for NVIDIA GPUs and in Mosaic for TPU, and promise less than
`grouped_matmul` does: rows beyond the last group stay as the memory was, and the Triton kernel
gives a group without rows a gradient of the block of rows before it, even if that begins before
the array (tokamax 0.0.12 masks a group's last block even where it has none).
"""

import contextlib
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

from moejax.extras import how_to_install
from moejax.kernels.device import platform
from moejax.kernels.grouped_matmul.dimensions import BY_MATRIX, BY_TRANSPOSE, OUTER
from moejax.kernels.grouped_matmul.products import Products, multiply
from moejax.kernels.zero_padding import zero_padding_rows

KERNELS: dict[str, tuple[Any, ...]] = {"gpu": ("triton",), "tpu": ("mosaic", "xla")}
"""By platform, the kernels of which the first that takes the shapes runs.

On TPU "xla", which is `ragged_dot`, takes those below 128.
"""


def why_unavailable() -> str | None:
    """Returns why its kernels do not run on the platform at hand; None if they do."""
    if platform() not in KERNELS:
        return "its kernels are for NVIDIA GPUs and TPUs"
    if platform() == "tpu" and jax.default_backend() != "tpu":
        return "its kernels for TPU look for one in this machine"
    if platform() == "gpu" and jax.__version_info__ >= (0, 12):
        return (
            f"tokamax 0.0.12 needs jax before 0.12 on GPU, and this is {jax.__version__}; "
            "set up with Python 3.11"
        )
    if importlib.util.find_spec("tokamax") is None:
        return f"tokamax is not installed; with Python 3.11, {how_to_install('tokamax')}"
    device = jax.devices()[0]
    if device.platform == "gpu" and not _is_new_enough(device):
        return (
            "its Triton kernels need an NVIDIA GPU of compute capability 8.0, and this is "
            f"{device.device_kind}"
        )
    return None


def _is_new_enough(device: jax.Device) -> bool:
    is_nvidia = "NVIDIA" in device.device_kind
    return is_nvidia and float(device.compute_capability) >= 8.0


BLOCK = 128
"""No block of tokamax's kernel for outer products has more rows, in any of its configurations."""


def grouped_matmul_tokamax(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    padding_rows: int = 0,
) -> Float[Array, "R F"]:
    """See `grouped_matmul`."""
    return multiply(PRODUCTS, x_RD, w_EDF, group_sizes_E, padding_rows)


def _outer_products(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Returns for each group the sum of the outer products of its rows."""
    # Zeros in front, as rows of the first group: no block begins before the array.
    in_front = ((BLOCK, 0), (0, 0))
    x_RD = jnp.pad(x_RD, in_front)
    dy_RF = jnp.pad(dy_RF, in_front)
    padded_sizes_E = group_sizes_E.at[0].add(BLOCK)
    dw_EDF = _product(x_RD, dy_RF, padded_sizes_E, OUTER)
    has_rows_E = group_sizes_E > 0
    has_rows_E11 = has_rows_E[:, None, None]
    return jnp.where(has_rows_E11, dw_EDF, 0)


def _rows_by_matrices(
    x_RP: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
    *,
    dimensions: RaggedDotDimensionNumbers,
) -> jax.Array:
    """Multiplies rows by matrices or by their transposes."""
    y_RQ = _product(x_RP, w_EDF, group_sizes_E, dimensions)
    return zero_padding_rows(y_RQ, group_sizes_E)


_BY_MATRIX = functools.partial(_rows_by_matrices, dimensions=BY_MATRIX)
_BY_TRANSPOSE = functools.partial(_rows_by_matrices, dimensions=BY_TRANSPOSE)


def _product(a, b, group_sizes_E, dimensions: RaggedDotDimensionNumbers):
    """Returns the product in the dtype of `a`: the kernels accumulate in float32 and round once.

    Marks absl's flags as parsed, if they are not: tokamax would parse the command line, and fail
    at flags that it does not know.
    """
    import tokamax  # an optional dependency
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    is_foreign = platform() != jax.default_backend()
    # Compiling for devices of another machine, it must not look at those of this one.
    with tokamax.config.cross_compile(True) if is_foreign else contextlib.nullcontext():
        return tokamax.ragged_dot_general(
            a,
            b,
            group_sizes_E,
            dimensions,
            preferred_element_type=a.dtype,
            implementation=KERNELS[platform()],
        )


PRODUCTS = Products(_BY_MATRIX, _BY_TRANSPOSE, _outer_products)
