"""Where tokens meet experts on a mesh: the only file with collectives.

The batch is split over `data`, `fsdp`, `dcn_expert` and `expert`, sequences over `context`, the
experts over `dcn_expert` (whose groups have slow links between them) and `expert`, and the hidden
width of each over `tensor`, whose partial outputs are added up. Weights are gathered over `fsdp`,
and their gradients reduce-scattered. Strategies differ in what travels along the axes of experts:

    gather       expert weights: every device has them all, and runs its own tokens
    ring         tokens: every device runs those of all devices through its experts; outputs are added and scattered
    all_to_all   each choice's token to its expert's device and its output back, in buffers of a fixed size
    ragged       the same rows without a buffer's empty ones (`jax.lax.ragged_all_to_all`)
    dedup        a token once to each device that has any of its experts; one row comes back, their weighted sum
    two_level    a token once to each group, and there once to each device that has any of its experts

All give the same results. Where a buffer of the last four has no room, tokens are left over: they
go to all devices, one device's after another, so that it takes time and no more memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moejax.kernels.device import platform
from moejax.kernels.vma import unify_vma, zeros_varying_like
from moejax.moe.dispatch.on_device import TokenChoice
from moejax.moe.dispatch.plan import add_up, plan_dropless
from moejax.moe.expert_parallel.buffers import (
    RaggedOffsets,
    SendBuffers,
    mean_receivers,
    pack_choices,
    pack_tokens,
    room_for,
)
from moejax.moe.expert_parallel.strategy import Exchange, LocalExperts, RunExperts, choose
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES, MESH_AXES, TOKENS

Counted = Callable[[jax.Array, Any, ExpertWeights], tuple[jax.Array, jax.Array]]
"""As `RunExperts`, and the choices of all devices that were left over meanwhile."""

Leg = Callable[[jax.Array, TokenChoice, ExpertWeights], tuple[jax.Array, jax.Array, jax.Array]]
"""From tokens `[1, T, D]`, `TokenChoice` and weights to outputs, the choices that are left over, `[T, K]`, and how many were
left over, and served, on the way."""

REST_PARTS = 8
"""Of a device's tokens, which take turns where some are left over."""

EXCHANGED = "exchanged"
"""The name of what arrived, for remat to save."""


def exchange(
    how: Exchange,
    local: LocalExperts,
    rows: LocalExperts | None,
    x_BLD: jax.Array,
    chosen: Any,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Runs dispatch, experts and combine on each device's part of the batch or of the experts.

    Args:
      how: the strategy.
      local: for `chosen` as it is.
      rows: for `TokenChoice` without a limit of capacity: choices that were refused are of no expert.
        None: if nobody chose.
      x_BLD: tokens.
      chosen: where they go: `TokenChoice`, `ExpertChoice` or `SoftSlots`, arrays with a leading axis of sequences.
      weights: of the experts.

    Returns:
      The combined outputs, and how many choices went the slow way because a buffer had no room, a
      float32 scalar.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(
        mesh.shape[axis] == 1 for axis in MESH_AXES
    ):  # XLA:CPU copies what is summed over one device
        return local.run(x_BLD, chosen, weights), jnp.float32(0)
    slow, fast = (mesh.shape[axis] for axis in EXPERT_AXES)
    top_k = chosen.experts_BLK.shape[-1] if rows is not None else 0
    strategy = choose(how, slow, fast, weights.down_EFD.shape[0], top_k)
    used = local if strategy in ("gather", "ring") or rows is None else rows

    def run(x_bLD, chosen, weights):
        weights = _add_bias_once(_gather_weights(weights, is_whole=strategy == "gather"))
        num_left = jnp.float32(0)
        if strategy == "gather":
            y_bLD = used.run(x_bLD, chosen, weights)
        elif strategy == "ring":
            y_bLD = _ring(used.run, x_bLD, chosen, weights)
        else:
            y_bLD, num_left = _send(how, strategy, used.run, x_bLD, chosen, weights)
        return jax.lax.psum(y_bLD, "tensor"), num_left

    has_bias = weights.network.has_bias
    split = dataclasses.replace(
        weights,
        gate_up_EDPF=PartitionSpec(EXPERT_AXES, "fsdp", None, "tensor"),
        down_EFD=PartitionSpec(EXPERT_AXES, "tensor", "fsdp"),
        gate_up_bias_EPF=PartitionSpec(EXPERT_AXES, None, "tensor") if has_bias else None,
        down_bias_ED=PartitionSpec(EXPERT_AXES, "fsdp") if has_bias else None,
    )
    in_specs, out_specs = (TOKENS, TOKENS, split), (TOKENS, PartitionSpec())
    sharded = jax.shard_map(
        run, in_specs=in_specs, out_specs=out_specs, check_vma=used.can_check_vma
    )
    return sharded(x_BLD, chosen, weights)


def _gather_weights(weights: ExpertWeights, *, is_whole: bool) -> ExpertWeights:
    """All of each expert's parts over `fsdp`; of all experts, if `is_whole`. The transpose is a reduce-scatter."""

    def whole(w, width_axis: int | None):
        if w is None:
            return None
        if width_axis is not None and jax.lax.axis_size("fsdp") > 1:
            # Gate and up side by side, as the product wants them: XLA:TPU lays them out anew, which
            # is less work for parts, and reduce-scatters gradients of three axes, where it
            # all-reduces those of four.
            flat = w.reshape(*w.shape[:2], -1) if w.ndim == 4 else w
            if w.shape[0] == 1:  # nor with a first axis of one
                flat = jax.lax.all_gather(flat[0], "fsdp", axis=width_axis - 1, tiled=True)[None]
            else:
                flat = jax.lax.all_gather(flat, "fsdp", axis=width_axis, tiled=True)
            w = flat.reshape(*flat.shape[:2], *w.shape[2:]) if w.ndim == 4 else flat
        if is_whole and jax.lax.axis_size(EXPERT_AXES) > 1:
            w = jax.lax.all_gather(w, EXPERT_AXES, axis=0, tiled=True)
        return w

    return dataclasses.replace(
        weights,
        gate_up_EDPF=whole(weights.gate_up_EDPF, 1),
        down_EFD=whole(weights.down_EFD, 2),
        gate_up_bias_EPF=whole(weights.gate_up_bias_EPF, None),
        down_bias_ED=whole(weights.down_bias_ED, 1),
    )


def _add_bias_once(weights: ExpertWeights) -> ExpertWeights:
    """The bias of the output on one of the devices whose partial outputs are added up, and zeros on the others."""
    if not weights.network.has_bias:
        return weights
    is_first = jax.lax.axis_index("tensor") == 0
    return dataclasses.replace(weights, down_bias_ED=jnp.where(is_first, weights.down_bias_ED, 0))


def _ring(run_local: RunExperts, x_bLD, chosen, weights: ExpertWeights):
    """All tokens of the axes of experts through this device's experts."""
    arrived = _gather_tokens(x_bLD), jax.tree.map(_gather_all, chosen)
    x_BLD, chosen = jax.tree.map(lambda a: checkpoint_name(a, EXCHANGED), arrived)
    num_local = weights.down_EFD.shape[0]
    here = chosen.of_experts(jax.lax.axis_index(EXPERT_AXES) * num_local, num_local)
    y_BLD = run_local(x_BLD, here, weights)
    return _add_and_scatter(y_BLD)


def _gather_all(a_bX: jax.Array) -> jax.Array:
    return jax.lax.all_gather(a_bX, EXPERT_AXES, axis=0, tiled=True)


@jax.custom_vjp
def _gather_tokens(x_bLD):
    """The tokens of all devices along the axes of experts; their gradients are added up as outputs are."""
    return _gather_all(x_bLD)


@jax.custom_vjp
def _add_and_scatter(y_BLD):
    """Adds up what devices made of all tokens, in float32, and gives each its own tokens' outputs."""
    sum_bLD = jax.lax.psum_scatter(
        y_BLD.astype(jnp.float32), EXPERT_AXES, scatter_dimension=0, tiled=True
    )
    return sum_bLD.astype(y_BLD.dtype)


_gather_tokens.defvjp(
    lambda x_bLD: (_gather_tokens(x_bLD), None), lambda _, dx_BLD: (_add_and_scatter(dx_BLD),)
)
_add_and_scatter.defvjp(
    lambda y_BLD: (_add_and_scatter(y_BLD), None), lambda _, dy_bLD: (_gather_tokens(dy_bLD),)
)


def _send(
    how: Exchange,
    strategy: str,
    run_rows: RunExperts,
    x_bLD,
    chosen: TokenChoice,
    weights: ExpertWeights,
):
    """Tokens to their experts and back, in chunks; and then what was left over."""
    x_1TD = x_bLD.reshape(1, -1, x_bLD.shape[-1])
    chosen = jax.tree.map(lambda a: a.reshape(1, -1, a.shape[-1]), chosen)
    num_tokens, top_k = chosen.experts_BLK.shape[1:]
    size = num_tokens // math.gcd(how.chunks, num_tokens)
    num_experts = weights.down_EFD.shape[0] * jax.lax.axis_size(EXPERT_AXES)
    leg = _leg(how.buffer_factor, strategy, run_rows, size, top_k, num_experts)
    if size < num_tokens:
        # What the experts of one chunk keep for the backward pass is computed again there, just
        # before it is used: the memory of one chunk serves all.
        leg = jax.checkpoint(leg, policy=jax.checkpoint_policies.save_only_these_names(EXCHANGED))
    parts = []
    for first in range(0, num_tokens, size):
        x_1tD, chosen_t = jax.tree.map(
            lambda a, first=first: a[:, first : first + size], (x_1TD, chosen)
        )
        parts.append(leg(x_1tD, chosen_t, weights))
    y_1TD = jnp.concatenate([y_1tD for y_1tD, _, _ in parts], axis=1)
    is_left_TK = jnp.concatenate([is_left_tK for _, is_left_tK, _ in parts])
    rest_1TD, num_left = _rest(EXPERT_AXES, run_rows, y_1TD, is_left_TK, x_1TD, chosen, weights)
    return (y_1TD + rest_1TD).reshape(x_bLD.shape), num_left + sum(number for _, _, number in parts)


def _leg(
    factor: float,
    strategy: str,
    run_rows: RunExperts,
    num_tokens: int,
    top_k: int,
    num_experts: int,
) -> Leg:
    """The way there and back of as many tokens on every device."""
    slow, fast = (jax.lax.axis_size(axis) for axis in EXPERT_AXES)
    num_devices, num_choices = slow * fast, num_tokens * top_k

    def run(x_1RD, chosen, weights):
        return run_rows(x_1RD, chosen, weights), jnp.float32(0)

    choices_each = room_for(num_choices / num_devices, factor, num_choices)
    if strategy == "all_to_all":
        pack = functools.partial(pack_choices, num_receivers=num_devices, slots=choices_each)
        return functools.partial(_by_buffers, EXPERT_AXES, pack, None, run)
    if strategy == "ragged":
        room = room_for(num_choices, factor, num_devices * num_choices)
        return functools.partial(_by_offsets, room, run)
    rows = num_tokens * mean_receivers(num_experts, top_k, num_devices)
    if strategy == "dedup":
        slots = room_for(rows / num_devices, factor, num_tokens)
        pack = functools.partial(
            pack_tokens, num_receivers=num_devices, slots=slots, max_choices=choices_each
        )
        return functools.partial(_by_buffers, EXPERT_AXES, pack, num_devices * choices_each, run)
    # Between groups, to the device with this one's place in its group; its tokens are those of all
    # groups in turn.
    groups_slots = room_for(
        num_tokens * mean_receivers(num_experts, top_k, slow) / slow, factor, num_tokens
    )
    arrived = slow * groups_slots
    slots, choices = (
        room_for(rows / fast, factor, arrived),
        room_for(num_choices / fast, factor, arrived * top_k),
    )
    pack = functools.partial(pack_tokens, num_receivers=fast, slots=slots, max_choices=choices)
    within = functools.partial(_by_buffers, ("expert",), pack, fast * choices, run)

    def in_group(x_1TD, chosen, weights):
        y_1TD, is_left_TK, _ = within(x_1TD, chosen, weights)
        rest_1TD, num_left = _rest(("expert",), run_rows, y_1TD, is_left_TK, x_1TD, chosen, weights)
        return y_1TD + rest_1TD, num_left

    pack = functools.partial(
        pack_tokens, num_receivers=slow, slots=groups_slots, max_choices=num_choices
    )
    return functools.partial(_by_buffers, ("dcn_expert",), pack, None, in_group)


def _scope(axes: tuple[str, ...], weights: ExpertWeights) -> tuple[int, int, jax.Array]:
    """Devices along axes of experts, the experts behind each of them, and the first of those behind this one."""
    behind = math.prod(
        jax.lax.axis_size(axis) for axis in EXPERT_AXES[EXPERT_AXES.index(axes[-1]) + 1 :]
    )
    num_behind = behind * weights.down_EFD.shape[0]
    return jax.lax.axis_size(axes), num_behind, jax.lax.axis_index(axes) * num_behind


def _by_buffers(
    axes: tuple[str, ...],
    pack: Callable[[jax.Array], SendBuffers],
    max_choices: int | None,
    run_there: Counted,
    x_1TD: jax.Array,
    chosen: TokenChoice,
    weights: ExpertWeights,
):
    """In buffers of a fixed size, packed by `pack`. A leg."""
    num_receivers, num_behind, first = _scope(axes, weights)
    receiver_TK = jnp.minimum(chosen.experts_BLK[0] // num_behind, num_receivers)
    parcels = pack(receiver_TK)

    def swap(a_RX):
        """The buffer for each device to it, and those for this one from all."""
        a_nCX = a_RX.reshape(num_receivers, -1, *a_RX.shape[1:])
        return jax.lax.all_to_all(a_nCX, axes, split_axis=0, concat_axis=0).reshape(a_RX.shape)

    sent = parcels.load(x_1TD[0], chosen, none=num_receivers * num_behind)
    x_RD, there = jax.tree.map(lambda a: checkpoint_name(swap(a), EXCHANGED), sent)
    there = dataclasses.replace(
        jax.tree.map(lambda a: a[None], there).of_experts(first, num_behind),
        max_choices=max_choices,
    )
    y_1RD, num_left = run_there(x_RD[None], there, weights)
    return add_up(swap(y_1RD[0]), parcels.plan)[None], parcels.is_left_TK, num_left


def _by_offsets(
    room: int, run_there: Counted, x_1TD: jax.Array, chosen: TokenChoice, weights: ExpertWeights
):
    """Rows sorted by receiver, each at its place among those that arrive there: `room` of them at most. A leg."""
    num_devices, num_local, first = _scope(EXPERT_AXES, weights)
    receiver_TK = jnp.minimum(chosen.experts_BLK[0] // num_local, num_devices)
    plan = plan_dropless(receiver_TK, num_devices)
    sizes_nn = jax.lax.all_gather(plan.group_sizes_E, EXPERT_AXES, axis=0)
    travel = RaggedOffsets.from_sizes(sizes_nn, jax.lax.axis_index(EXPERT_AXES), room)
    parcels = travel.pack(plan, receiver_TK)
    sent = parcels.load(x_1TD[0], chosen, none=num_devices * num_local)
    x_RD, there = jax.tree.map(lambda a: checkpoint_name(_travel(a, travel, room), EXCHANGED), sent)
    there = dataclasses.replace(
        there, experts_BLK=jnp.where(travel.is_row(room), there.experts_BLK, first - 1)
    )
    there = jax.tree.map(lambda a: a[None], there).of_experts(first, num_local)
    y_1RD, num_left = run_there(x_RD[None], there, weights)
    y_RD = _travel(y_1RD[0], travel.back(), num_rows=sent[0].shape[0])
    return add_up(y_RD, parcels.plan)[None], parcels.is_left_TK, num_left


def _travel(a_RX: jax.Array, travel: RaggedOffsets, num_rows: int) -> jax.Array:
    """An array of `num_rows` rows of what arrives, and zeros."""
    if jnp.issubdtype(a_RX.dtype, jnp.integer):
        return _ragged_all_to_all(a_RX, travel, num_rows)
    return _travel_with_gradient(num_rows, a_RX, travel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _travel_with_gradient(num_rows, a_RX, travel):
    return _ragged_all_to_all(a_RX, travel, num_rows)


_travel_with_gradient.defvjp(
    lambda num_rows, a_RX, travel: (
        _ragged_all_to_all(a_RX, travel, num_rows),
        (travel, a_RX.shape[0]),
    ),
    lambda _, kept, da_RX: (_travel_with_gradient(kept[1], da_RX, kept[0].back()), None),
)


def _ragged_all_to_all(a_RX: jax.Array, travel: RaggedOffsets, num_rows: int) -> jax.Array:
    if platform() == "cpu":
        return _emulate_ragged_all_to_all(a_RX, travel, num_rows)
    output_SX = zeros_varying_like(a_RX, (num_rows, *a_RX.shape[1:]), a_RX.dtype)
    offsets = (
        travel.input_offsets_n,
        travel.send_sizes_n,
        travel.output_offsets_n,
        travel.recv_sizes_n,
    )
    return jax.lax.ragged_all_to_all(a_RX, output_SX, *offsets, axis_name=EXPERT_AXES)


def _emulate_ragged_all_to_all(a_RX: jax.Array, travel: RaggedOffsets, num_rows: int) -> jax.Array:
    """The same from the same offsets, for XLA:CPU, which has no such collective: everything goes everywhere."""
    me = jax.lax.axis_index(EXPERT_AXES)
    gathered = jax.tree.map(
        lambda a: jax.lax.all_gather(a, EXPERT_AXES, axis=0),
        (a_RX, travel.input_offsets_n, travel.send_sizes_n, travel.output_offsets_n),
    )
    a_nRX, starts_nn, sent_nn, places_nn = gathered
    row_1S = jnp.arange(num_rows)[None]
    place_n1, sent_n1, start_n1 = (a_nn[:, me][:, None] for a_nn in (places_nn, sent_nn, starts_nn))
    is_from_nS = (place_n1 <= row_1S) & (row_1S < place_n1 + sent_n1)
    sender_S = jnp.argmax(is_from_nS, axis=0)
    source_S = jnp.take_along_axis(row_1S - place_n1 + start_n1, sender_S[None], axis=0)[0]
    rows_SX = a_nRX.at[sender_S, source_S].get(mode="clip")
    is_row_S = is_from_nS.any(axis=0).reshape(-1, *[1] * (a_RX.ndim - 1))
    return jnp.where(is_row_S, rows_SX, 0)


def _rest(
    axes: tuple[str, ...],
    run_rows: RunExperts,
    like_1TD: jax.Array,
    is_left_TK: jax.Array,
    x_1TD: jax.Array,
    chosen: TokenChoice,
    weights: ExpertWeights,
):
    """What the experts along `axes` make of the choices that are left over, if any are on any device; and their number.

    One device's tokens after another's go to all, in parts: the arrays are smaller than those of
    the way in buffers, beside which the compiler must hold them.
    """
    num_devices, num_behind, first = _scope(axes, weights)
    experts_1TK = jnp.where(is_left_TK[None], chosen.experts_BLK, num_devices * num_behind)
    left = dataclasses.replace(chosen, experts_BLK=experts_1TK, max_choices=None)
    zeros_1TD = jnp.zeros_like(like_1TD)

    def in_turns(x_1TD, left, weights):
        @jax.checkpoint
        def turn(sum_1tD, part_and_sender):
            (x_1tD, left_t), sender = part_and_sender
            is_mine = jax.lax.axis_index(axes) == sender
            x_1tD, left_t = jax.tree.map(
                lambda a: jax.lax.psum(jnp.where(is_mine, a, 0), axes), (x_1tD, left_t)
            )
            part_1tD = run_rows(x_1tD, left_t.of_experts(first, num_behind), weights)
            y_1tD = jax.lax.psum(part_1tD.astype(jnp.float32), axes).astype(part_1tD.dtype)
            return sum_1tD + jnp.where(is_mine, y_1tD, 0), None

        def one_part(part):
            zeros_1tD = zeros_1TD[:, : part[0].shape[1]]
            return jax.lax.scan(
                lambda s, sender: turn(s, (part, sender)), zeros_1tD, jnp.arange(num_devices)
            )[0]

        num_parts = math.gcd(REST_PARTS, x_1TD.shape[1])
        parts = jax.tree.map(
            lambda a: a.reshape(1, num_parts, -1, a.shape[-1]).swapaxes(0, 1), (x_1TD, left)
        )
        return jax.lax.map(one_part, parts).swapaxes(0, 1).reshape(zeros_1TD.shape)

    # The same on all devices, which must take the same branch.
    num_left = jax.lax.psum(unify_vma(is_left_TK.sum(dtype=jnp.float32), like_1TD)[0], MESH_AXES)
    y_1TD = jax.lax.cond(
        num_left == 0, lambda *_: zeros_1TD, jax.checkpoint(in_turns), x_1TD, left, weights
    )
    return y_1TD, num_left / jax.lax.axis_size("tensor")  # whose devices all count the same
