"""The grouped product as batched products over equal slots, for platforms without a grouped kernel.

Every group puts as many rows as there are slots into one batched product, and groups with more rows
another time: the arithmetic is that of the largest group times the number of groups, where XLA's
own lowering of `ragged_dot` multiplies all rows by all matrices. How often is known only when the
program runs; memory does not depend on it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul.products import Products, multiply
from moejax.kernels.vma import zeros_varying_like


def grouped_matmul_padded(
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
    """Returns for each group the sum of the outer products of its rows, in float32."""
    num_rows, width_D = x_RD.shape
    width_F = dy_RF.shape[1]
    num_groups = group_sizes_E.shape[0]

    def add_turn(turn, dw_EDF):
        rows_EC = _rows_of_turn(turn, group_sizes_E, num_rows)
        x_ECD = _gather(x_RD, rows_EC)
        dy_ECF = _gather(dy_RF, rows_EC)
        return dw_EDF + _einsum("ECD,ECF->EDF", x_ECD, dy_ECF)

    shape = (num_groups, width_D, width_F)
    zeros_EDF = zeros_varying_like(dy_RF, shape, jnp.float32)
    num_turns = _num_turns(group_sizes_E, num_rows)
    return lax.fori_loop(0, num_turns, add_turn, zeros_EDF)


def slots(num_rows: int, num_groups: int) -> int:
    """Returns the rows of each group in one turn: a quarter more than the mean, in steps of 8."""
    num_eights = math.ceil(1.25 * num_rows / num_groups / 8)
    return num_eights * 8


def _rows_by_matrices(
    x_RP: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
    *,
    equation: str,
    axis: int,
) -> jax.Array:
    """Multiplies rows by matrices; `axis` of these is that of the results."""
    num_rows = x_RP.shape[0]
    width = w_EDF.shape[axis]

    def one_turn(turn, y_RQ):
        rows_EC = _rows_of_turn(turn, group_sizes_E, num_rows)
        x_ECP = _gather(x_RP, rows_EC)
        y_ECQ = _einsum(equation, x_ECP, w_EDF)
        y_ECQ = y_ECQ.astype(y_RQ.dtype)
        return y_RQ.at[rows_EC].set(y_ECQ, mode="drop")

    zeros_RQ = zeros_varying_like(x_RP, (num_rows, width), x_RP.dtype)
    num_turns = _num_turns(group_sizes_E, num_rows)
    return lax.fori_loop(0, num_turns, one_turn, zeros_RQ)


_BY_MATRIX = functools.partial(_rows_by_matrices, equation="ECD,EDF->ECF", axis=2)
_BY_TRANSPOSE = functools.partial(_rows_by_matrices, equation="ECF,EDF->ECD", axis=1)


def _num_turns(group_sizes_E, num_rows: int):
    """Returns how many turns the largest group needs: its rows over its slots, rounded up."""
    num_groups = group_sizes_E.shape[0]
    num_slots = slots(num_rows, num_groups)
    return -(-group_sizes_E.max() // num_slots)


def _rows_of_turn(turn, group_sizes_E, num_rows: int):
    """Returns the rows of every group in this turn's slots; `num_rows` where it has no more."""
    num_groups = group_sizes_E.shape[0]
    num_slots = slots(num_rows, num_groups)
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    starts_E1 = starts_E[:, None]
    first_place = turn * num_slots
    slot_C = jnp.arange(num_slots)
    place_1C = first_place + slot_C[None]
    is_row_EC = place_1C < group_sizes_E[:, None]
    row_EC = starts_E1 + place_1C
    return jnp.where(is_row_EC, row_EC, num_rows)


def _gather(x_RP, rows_EC):
    """Returns the rows of every group; zeros where there is none."""
    return x_RP.at[rows_EC].get(mode="fill", fill_value=0)


def _einsum(equation: str, a, b):
    """Returns the products in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


PRODUCTS = Products(_BY_MATRIX, _BY_TRANSPOSE, _outer_products)
