"""The experts' feed-forward networks from tokens to tokens in one pass over grouped rows, for CPU.

What a layer of separate steps writes and reads again (rows of tokens, hidden units, rows of
outputs) stays within a tile: it gathers its rows from the tokens, multiplies by gate and up
projections in one product, activates, multiplies by the combine weight, and by the down projection.
Between forward and backward only the projections of the rows are kept. The backward pass forms
every gradient in one loop of the same kind; that of a combine weight needs no output: for y = w *
act(h) @ down it is the sum of act(h) * (dy @ down^T).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.kernels.batching import each_arm, merge, split
from moejax.kernels.fused_passes import Activate, Inputs, backward_pass, forward_pass
from moejax.kernels.vma import unify_vma


class SecondDerivativeError(ValueError):
    """A derivative that is of too high an order."""


class Rows(NamedTuple):
    """Which choices are in which rows, sorted by expert.

    Attributes:
      row_TK: the row of a choice; R where it has none.
      choice_R: the choice t * K + k in a row; T * K where the row is empty. R is the number of rows
        in groups at most, plus the largest size of a tile, for the last tile may reach there.
      group_sizes_E: rows of each expert.
    """

    row_TK: Int[Array, "T K"]
    choice_R: Int[Array, "R"]
    group_sizes_E: Int[Array, "E"]


@takes_numpy
def feed_forward(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    gate_up_EDPF: Float[Array, "E D P F"],
    down_EFD: Float[Array, "E F D"],
    rows: Rows,
    *,
    activate: Activate,
    sizes: tuple[int, ...],
    max_rows: int | None = None,
) -> Float[Array, "T D"]:
    """Adds up each token's outputs of its experts, times their combine weights.

    Computes `sum_k weights[t, k] * down(activate(gate_up(x[t])))`.

    Args:
      x_TD: tokens, float32 or bfloat16.
      weights_TK: combine weights.
      gate_up_EDPF: P projections of every expert.
      down_EFD: the projection out of every expert.
      rows: of the choices.
      activate: from P arrays `[rows, F]` to the hidden units `[rows, F]`.
      sizes: of tiles, rising; see `tile_sizes`.
      max_rows: no more rows are in groups; None: T * K.

    Returns:
      The outputs, in the dtype of `x_TD` with float32 accumulation; zeros for a token without rows.
      An expert without rows has exactly zero gradient.

    Raises:
      ValueError: too few padding rows.
      SecondDerivativeError: while its gradients are differentiated.
    """
    num_in_groups = max_rows or weights_TK.size
    _check_padding(rows.choice_R.shape[0], num_in_groups, sizes[-1])
    num_experts, d_model = gate_up_EDPF.shape[:2]
    gate_up_EDP = gate_up_EDPF.reshape(num_experts, d_model, -1)
    # Outside of the custom VJP: the transpose sums the gradient of replicated weights over devices.
    arrays = unify_vma(x_TD, weights_TK, gate_up_EDP, down_EFD, *rows)
    sizes_E = arrays[-1]
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    return _feed_forward(activate, sizes, *arrays, starts_E)


def _check_padding(num_rows: int, num_in_groups: int, largest: int) -> None:
    """Raises if a tile of the largest size could reach past the last row."""
    num_needed = num_in_groups + largest
    if num_rows < num_needed:
        # A slice that would pass the end is silently moved back, onto rows of other experts.
        raise ValueError(
            f"choice_R has {num_rows} rows and must have {num_needed}; "
            f"plan with padding_rows={largest}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(activate, sizes, *arrays):
    run_pass = functools.partial(forward_pass, activate, sizes, keep=False)
    y_TD, _ = _over_arms(run_pass, *arrays)
    return y_TD


def _forward(activate, sizes, *arrays):
    y_TD, projected_RP = _with_projections(activate, sizes, *arrays)
    return y_TD, (projected_RP, arrays)


def _backward(activate, sizes, residuals, dy_TD):
    projected_RP, arrays = residuals
    gradients = _gradients(activate, sizes, *arrays, projected_RP, dy_TD)
    # Rows, choices, sizes and starts are integers.
    return *gradients, None, None, None, None


_feed_forward.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_projections(activate, sizes, *arrays):
    run_pass = functools.partial(forward_pass, activate, sizes, keep=True)
    return _over_arms(run_pass, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(activate, sizes, *arrays):
    run_pass = functools.partial(backward_pass, activate, sizes)
    return _over_arms(run_pass, *arrays)


def _refuse(activate, sizes, *arrays):
    """Refuses second derivatives: neither pass of the first can be differentiated."""
    raise SecondDerivativeError(
        "moe.grouped_matmul=tiled: its pass from tokens to tokens has first derivatives only; "
        "for second ones use moe.grouped_matmul=padded"
    )


_with_projections.defvjp(_refuse, _refuse)
_gradients.defvjp(_refuse, _refuse)


def _over_arms(function, *arrays):
    """Returns `function(inputs, *others)`; `vmap` over A arms makes one call of A * E experts.

    Plain `vmap` would run each loop over tiles for as long as the fullest of an expert's arms
    needs, and throw away what it computes for the others. Here the arms follow each other, each
    with its padding rows at its end.

    Args:
      function: its results have tokens, rows or experts on their first axis.
      arrays: the fields of `Inputs`, then `others`, which have such a first axis too.
    """
    num_inputs = len(Inputs._fields)

    @custom_vmap
    def one(*arrays):
        inputs = Inputs(*arrays[:num_inputs])
        return function(inputs, *arrays[num_inputs:])

    @one.def_vmap
    def all_arms(num_arms: int, is_batched, *arrays):
        each = each_arm(num_arms, is_batched, arrays)
        inputs = Inputs(*each[:num_inputs])
        others = each[num_inputs:]
        inputs = _number_across_arms(inputs, num_arms)
        folded = map(merge, (*inputs, *others))
        results = _over_arms(function, *folded)
        by_arm = tuple(split(result, num_arms) for result in results)
        has_arms = (True,) * len(by_arm)
        return by_arm, has_arms

    return one(*arrays)


def _number_across_arms(inputs: Inputs, num_arms: int) -> Inputs:
    """Counts the rows and choices of each arm on from those of the arm before.

    All arrays have a leading axis of arms. "No row" and "no choice" become the numbers of all rows
    and of all choices.
    """
    row_ATK = inputs.row_TK
    choice_AR = inputs.choice_R
    starts_AE = inputs.starts_E
    num_rows = choice_AR.shape[1]
    num_choices = inputs.weights_TK[0].size
    first_row_A = jnp.arange(num_arms) * num_rows
    first_choice_A = jnp.arange(num_arms) * num_choices
    is_row_ATK = row_ATK < num_rows
    row_in_all_ATK = row_ATK + first_row_A[:, None, None]
    no_row = num_arms * num_rows
    row_ATK = jnp.where(is_row_ATK, row_in_all_ATK, no_row)
    is_choice_AR = choice_AR < num_choices
    choice_in_all_AR = choice_AR + first_choice_A[:, None]
    no_choice = num_arms * num_choices
    choice_AR = jnp.where(is_choice_AR, choice_in_all_AR, no_choice)
    first_row_A1 = first_row_A[:, None]
    first_row_A1 = first_row_A1.astype(starts_AE.dtype)
    return inputs._replace(
        row_TK=row_ATK,
        choice_R=choice_AR,
        starts_E=starts_AE + first_row_A1,
    )
