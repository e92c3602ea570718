"""The experts' feed-forward networks from tokens to tokens in one pass over grouped rows, for CPU.

What a layer of separate steps writes and reads again (rows of tokens, hidden units, rows of
outputs) stays within a tile: it gathers its rows from the tokens, multiplies by gate and up
projections in one product, activates, multiplies by the combine weight, and by the down projection.
Between forward and backward only the projections of the rows are kept. The backward pass forms
every gradient in one loop of the same kind; that of a combine weight needs no output: for y = w *
act(h) @ down it is the sum of act(h) * (dy @ down^T).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.kernels.batching import each_arm, merge, split
from moejax.kernels.rows import add_rows
from moejax.kernels.tiles import Groups, dynamic_slice, dynamic_update
from moejax.kernels.vma import empty_varying_like, unify_vma


class SecondDerivativeError(ValueError):
    """A derivative that is of too high an order."""


Activate = Callable[[list[jax.Array]], jax.Array]


@takes_numpy
def feed_forward(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    gate_up_EDPF: Float[Array, "E D P F"],
    down_EFD: Float[Array, "E F D"],
    row_TK: Int[Array, "T K"],
    choice_R: Int[Array, "R"],
    group_sizes_E: Int[Array, "E"],
    *,
    activate: Activate,
    sizes: tuple[int, ...],
    max_rows: int | None = None,
) -> Float[Array, "T D"]:
    """Adds up each token's outputs of its experts, `sum_k weights[t, k] * down(activate(gate_up(x[t])))`.

    Args:
      x_TD: tokens, float32 or bfloat16.
      weights_TK: combine weights.
      gate_up_EDPF: P projections of every expert.
      down_EFD: the projection out of every expert.
      row_TK: the row of a choice among the rows sorted by expert; R where it has none.
      choice_R: the choice t * K + k in a row; T * K where the row is empty. R is `max_rows` plus
        the largest of `sizes`, for the last tile may reach there.
      group_sizes_E: rows of each expert.
      activate: from P arrays `[rows, F]` to the hidden units `[rows, F]`.
      sizes: of tiles, rising; see `tile_sizes`.
      max_rows: no more rows are in groups; None: T * K.

    Returns:
      The outputs, in the dtype of `x_TD` with float32 accumulation; zeros for a token without rows.
      An expert without rows has exactly zero gradient.

    Raises:
      ValueError: too few spare rows.
      SecondDerivativeError: while its gradients are differentiated.
    """
    num_rows, num_needed = choice_R.shape[0], (max_rows or weights_TK.size) + sizes[-1]
    if num_rows < num_needed:
        # A slice that would pass the end is moved back in silence, onto rows of other experts.
        raise ValueError(
            f"choice_R has {num_rows} rows and must have {num_needed}; plan with spare_rows={sizes[-1]}"
        )
    gate_up_EDP = gate_up_EDPF.reshape(*gate_up_EDPF.shape[:2], -1)
    # Outside of the custom VJP: the transpose sums the gradient of replicated weights over devices.
    arrays = unify_vma(x_TD, weights_TK, gate_up_EDP, down_EFD, row_TK, choice_R, group_sizes_E)
    starts_E = jnp.cumsum(arrays[-1]) - arrays[-1]
    return _feed_forward(activate, sizes, *arrays, starts_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(activate, sizes, *arrays):
    return _over_arms(functools.partial(_forward_pass, activate, sizes, keep=False), *arrays)[0]


def _forward(activate, sizes, *arrays):
    y_TD, projected_RP = _with_projections(activate, sizes, *arrays)
    return y_TD, (projected_RP, arrays)


def _backward(activate, sizes, residuals, dy_TD):
    projected_RP, arrays = residuals
    return *_gradients(activate, sizes, *arrays, projected_RP, dy_TD), None, None, None, None


_feed_forward.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_projections(activate, sizes, *arrays):
    return _over_arms(functools.partial(_forward_pass, activate, sizes, keep=True), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(activate, sizes, *arrays):
    return _over_arms(functools.partial(_backward_pass, activate, sizes), *arrays)


def _refuse(activate, sizes, *arrays):
    """What a second derivative asks for: neither pass of the first can be differentiated."""
    raise SecondDerivativeError(
        "moe.grouped_matmul=tiled: its pass from tokens to tokens has first derivatives only; for second ones use "
        "moe.grouped_matmul=padded"
    )


_with_projections.defvjp(_refuse, _refuse)
_gradients.defvjp(_refuse, _refuse)


def _over_arms(
    function, x_TD, weights_TK, gate_up_EDP, down_EFD, row_TK, choice_R, sizes_E, starts_E, *others
):
    """`function` of these arrays; `vmap` over the arms of a sweep makes one call of A * E experts of it.

    Plain `vmap` would run each loop over tiles for as long as the fullest of an expert's arms
    needs, and throw away what it computes for the others. Here arms lie one behind another, with
    the spare rows of each between them. The results have tokens, rows or experts on their first
    axis, as `others` do.
    """

    @custom_vmap
    def one(*arrays):
        return function(*arrays)

    @one.def_vmap
    def all_arms(num_arms: int, is_batched, *arrays):
        each = each_arm(num_arms, is_batched, arrays)
        (
            x_ATD,
            weights_ATK,
            gate_up_AEDP,
            down_AEFD,
            row_ATK,
            choice_AR,
            sizes_AE,
            starts_AE,
            *others,
        ) = each
        num_rows, num_choices = choice_AR.shape[1], weights_ATK[0].size
        first_row_A, first_choice_A = (
            jnp.arange(num_arms) * num_rows,
            jnp.arange(num_arms) * num_choices,
        )
        row_ATK = jnp.where(
            row_ATK < num_rows, row_ATK + first_row_A[:, None, None], num_arms * num_rows
        )
        is_choice_AR = choice_AR < num_choices
        choice_AR = jnp.where(
            is_choice_AR, choice_AR + first_choice_A[:, None], num_arms * num_choices
        )
        starts_AE = starts_AE + first_row_A[:, None].astype(starts_AE.dtype)
        folded = (
            x_ATD,
            weights_ATK,
            gate_up_AEDP,
            down_AEFD,
            row_ATK,
            choice_AR,
            sizes_AE,
            starts_AE,
            *others,
        )
        results = _over_arms(function, *map(merge, folded))
        return tuple(split(result, num_arms) for result in results), tuple(True for _ in results)

    return one(
        x_TD, weights_TK, gate_up_EDP, down_EFD, row_TK, choice_R, sizes_E, starts_E, *others
    )


def _forward_pass(
    activate,
    sizes,
    x_TD,
    weights_TK,
    gate_up_EDP,
    down_EFD,
    row_TK,
    choice_R,
    sizes_E,
    starts_E,
    *,
    keep: bool,
):
    """The outputs of tokens, and the projections of rows (none, unless they are to be kept)."""
    groups = Groups.from_sizes(sizes_E, starts_E, sizes)
    arrays = x_TD, weights_TK, gate_up_EDP, down_EFD, choice_R
    y_RD, projected_RP = _forward_rows(activate, groups, *arrays, keep=keep)
    return add_rows(y_RD, row_TK).astype(x_TD.dtype), projected_RP


def _backward_pass(
    activate,
    sizes,
    x_TD,
    weights_TK,
    gate_up_EDP,
    down_EFD,
    row_TK,
    choice_R,
    sizes_E,
    starts_E,
    projected_RP,
    dy_TD,
):
    """Gradients of tokens, of combine weights and of all matrices."""
    groups = Groups.from_sizes(sizes_E, starts_E, sizes)
    arrays = x_TD, weights_TK, gate_up_EDP, down_EFD, choice_R
    dx_RD, dweight_R, dgate_up_EDP, ddown_EFD = _backward_rows(
        activate, groups, dy_TD, projected_RP, *arrays
    )
    dweights_TK = dweight_R.at[row_TK].get(mode="fill", fill_value=0).astype(weights_TK.dtype)
    dmatrices = dgate_up_EDP.astype(gate_up_EDP.dtype), ddown_EFD.astype(down_EFD.dtype)
    return add_rows(dx_RD, row_TK).astype(dy_TD.dtype), dweights_TK, *dmatrices


def _forward_rows(
    activate, groups, x_TD, weights_TK, gate_up_EDP, down_EFD, choice_R, *, keep: bool
):
    """Weighted outputs of the rows and, to `keep` for the backward pass, their projections; rest is left undefined."""
    token_R, weight_R = _of_rows(weights_TK, choice_R)
    num_rows, d_model, num_projected = choice_R.shape[0], x_TD.shape[1], gate_up_EDP.shape[2]
    x_TD = _to_float32(x_TD)

    def one_expert(e, carry):
        gate_up_DP, down_FD = _matrix(gate_up_EDP, e), _matrix(down_EFD, e)

        def one_tile(size, row, carry):
            y_RD, projected_RP = carry
            projected_bP = _dot(_gather(x_TD, dynamic_slice(token_R, row, size)), gate_up_DP, 1, 0)
            hidden_bF = (
                activate(_split(projected_bP, down_FD.shape[0]))
                * dynamic_slice(weight_R, row, size)[:, None]
            )
            y_RD = dynamic_update(y_RD, _dot(hidden_bF, down_FD, 1, 0), row)
            return y_RD, dynamic_update(projected_RP, projected_bP, row) if keep else projected_RP

        return groups.for_each_tile(e, one_tile, one_tile, carry)

    y_RD = empty_varying_like(x_TD, (num_rows, d_model), jnp.float32)
    projected_RP = empty_varying_like(x_TD, (num_rows if keep else 0, num_projected), jnp.float32)
    return groups.for_each_active(one_expert, (y_RD, projected_RP))


def _backward_rows(
    activate, groups, dy_TD, projected_RP, x_TD, weights_TK, gate_up_EDP, down_EFD, choice_R
):
    """Gradients of the rows and of their weights, rest left undefined, and in float32 of all matrices."""
    token_R, weight_R = _of_rows(weights_TK, choice_R)
    num_rows, d_model = choice_R.shape[0], x_TD.shape[1]
    x_TD, dy_TD = _to_float32(x_TD), _to_float32(dy_TD)

    def one_expert(e, carry):
        gate_up_DP, down_FD = _matrix(gate_up_EDP, e), _matrix(down_EFD, e)

        def one_tile(size, row, carry):
            """Gradients of rows in their places, and the tile's part in those of the matrices."""
            dx_RD, dweight_R = carry
            token_b = dynamic_slice(token_R, row, size)
            # Rows past the group's end are of other experts, or undefined: they must not reach
            # the matrices.
            is_row_b1 = (row + jnp.arange(size) < groups.ends_E[e])[:, None]
            x_bD, dy_bD = (
                jnp.where(is_row_b1, _gather(a_TD, token_b), 0) for a_TD in (x_TD, dy_TD)
            )
            weight_b1 = dynamic_slice(weight_R, row, size)[:, None]
            projected_bP = jnp.where(is_row_b1, dynamic_slice(projected_RP, row, size), 0)
            hidden_bF, pull = jax.vjp(activate, _split(projected_bP, down_FD.shape[0]))
            dhidden_bF = _dot(dy_bD, down_FD, 1, 1)
            (dparts,) = pull(dhidden_bF * weight_b1)
            dprojected_bP = jnp.concatenate(dparts, axis=1)
            dx_RD = dynamic_update(dx_RD, _dot(dprojected_bP, gate_up_DP, 1, 1), row)
            dweight_R = dynamic_update(dweight_R, (hidden_bF * dhidden_bF).sum(axis=1), row)
            parts = (
                _outer_products(x_bD, dprojected_bP),
                _outer_products(hidden_bF * weight_b1, dy_bD),
            )
            return (dx_RD, dweight_R), parts

        def rest(size, row, carry):
            rows, parts = one_tile(size, row, carry[0])
            return rows, tuple(
                _replace(total, part, e) for total, part in zip(carry[1], parts, strict=True)
            )

        def full(size, row, carry):
            rows, parts = one_tile(size, row, carry[0])
            return rows, tuple(
                _replace(total, total[e] + part, e)
                for total, part in zip(carry[1], parts, strict=True)
            )

        return groups.for_each_tile(e, rest, full, carry)

    def no_rows(e, totals):
        return tuple(
            _replace(total, jnp.zeros_like(total, shape=total.shape[1:]), e) for total in totals
        )

    rows = (
        empty_varying_like(x_TD, (num_rows, d_model), jnp.float32),
        empty_varying_like(x_TD, (num_rows,), jnp.float32),
    )
    totals = tuple(empty_varying_like(x_TD, w.shape, jnp.float32) for w in (gate_up_EDP, down_EFD))
    rows, totals = groups.for_each_active(one_expert, (rows, totals))
    return *rows, *groups.for_each_empty(no_rows, totals)


def _of_rows(weights_TK, choice_R):
    """The token and the weight of each row."""
    weight_R = weights_TK.reshape(-1).at[choice_R].get(mode="fill", fill_value=0)
    return choice_R // weights_TK.shape[1], _to_float32(weight_R)


def _gather(x_TD, token_b):
    """Rows of tokens; those of tokens out of range are of use to nobody."""
    return x_TD.at[token_b].get(mode="clip")


def _matrix(w_EPQ, e):
    """The matrix of one expert in float32.

    XLA:CPU slices bfloat16 by way of float32 and would convert all matrices before the loop, as
    they do not change in it: behind a barrier with `e` they might.
    """
    w_EPQ, e = lax.optimization_barrier((w_EPQ, e))
    return _to_float32(lax.dynamic_index_in_dim(w_EPQ, e, keepdims=False))


def _replace(w_EPQ, w_PQ, e):
    return lax.dynamic_update_index_in_dim(w_EPQ, w_PQ, e, axis=0)


def _split(projected_bP, width: int) -> list[jax.Array]:
    return [projected_bP[:, i : i + width] for i in range(0, projected_bP.shape[1], width)]


def _dot(a, b, a_axis: int, b_axis: int):
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _outer_products(a_bP, b_bQ):
    """The sum of outer products of rows: XLA:CPU is up to twice as fast if the left side is transposed before."""
    return _dot(lax.optimization_barrier(a_bP.T), b_bQ, 1, 0)


def _to_float32(x):
    """float32, in which CPUs multiply bfloat16 faster and accumulate exactly; they move it faster, too."""
    return x.astype(jnp.float32)
