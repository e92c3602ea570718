"""Sending tokens in chunks, and the fallback for choices that found no room in a buffer.

Nothing is dropped: choices without room go to all devices, one device's after another's, so that
the fallback costs time and no more memory.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.kernels.vma import unify_vma
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.expert_parallel.strategy import EXCHANGED, RunExperts
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES, MESH_AXES

FALLBACK_PARTS = 8
"""Parts of a device's tokens, which take turns in the fallback."""


class Returned(NamedTuple):
    """What comes back from sending tokens to their experts.

    Attributes:
      y_1TD: outputs, without the choices that found no room.
      is_overflow_TK: choices that found no room here.
      num_overflow: choices, of all devices, that found no room on the way and were served there.
    """

    y_1TD: jax.Array
    is_overflow_TK: jax.Array
    num_overflow: jax.Array


RoundTrip = Callable[[jax.Array, TokenChoice, ExpertWeights], Returned]
"""Sends tokens `[1, T, D]` to their experts and back."""


class ExpertScope(NamedTuple):
    """Which experts the devices along some axes have.

    Attributes:
      num_devices: n, devices along the axes.
      num_experts: experts that each of them leads to.
      first: the first expert that this device leads to.
    """

    num_devices: int
    num_experts: int
    first: jax.Array


def expert_scope(axes: tuple[str, ...], weights: ExpertWeights) -> ExpertScope:
    """Returns which experts the devices along `axes` have, or lead to through inner axes."""
    innermost = EXPERT_AXES.index(axes[-1])
    inner_axes = EXPERT_AXES[innermost + 1 :]
    num_inner = math.prod(jax.lax.axis_size(axis) for axis in inner_axes)
    num_experts = num_inner * weights.down_EFD.shape[0]
    return ExpertScope(jax.lax.axis_size(axes), num_experts, jax.lax.axis_index(axes) * num_experts)


def send_in_chunks(
    make_round_trip: Callable[[int], RoundTrip],
    num_chunks: int,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Sends tokens to their experts and back, in chunks; then what found no room.

    Args:
      make_round_trip: makes a round trip for that many tokens of every device.
      num_chunks: wanted; as many as divide the tokens are taken.
      run_experts: for the fallback.
      x_bLD: the tokens of this device.
      choice: their experts.
      weights: of this device's experts.

    Returns:
      The combined outputs, and how many choices of all devices went through the fallback.
    """
    x_1TD = x_bLD.reshape(1, -1, x_bLD.shape[-1])
    choice = jax.tree.map(lambda a: a.reshape(1, -1, a.shape[-1]), choice)
    num_tokens = x_1TD.shape[1]
    chunk_size = num_tokens // math.gcd(num_chunks, num_tokens)
    round_trip = make_round_trip(chunk_size)
    if chunk_size < num_tokens:
        # What the experts of one chunk keep for the backward pass is computed again there, just
        # before it is used: the memory of one chunk serves all.
        policy = jax.checkpoint_policies.save_only_these_names(EXCHANGED)
        round_trip = jax.checkpoint(round_trip, policy=policy)
    returned = []
    for first in range(0, num_tokens, chunk_size):
        x_1tD, choice_t = _slice_tokens((x_1TD, choice), first, chunk_size)
        returned.append(round_trip(x_1tD, choice_t, weights))
    y_1TD = jnp.concatenate([chunk.y_1TD for chunk in returned], axis=1)
    is_overflow_TK = jnp.concatenate([chunk.is_overflow_TK for chunk in returned])
    overflow_1TD, num_overflow = run_overflow(
        EXPERT_AXES, run_experts, x_1TD, choice, is_overflow_TK, weights, like_1TD=y_1TD
    )
    num_overflow += sum(chunk.num_overflow for chunk in returned)
    return (y_1TD + overflow_1TD).reshape(x_bLD.shape), num_overflow


def run_overflow(
    axes: tuple[str, ...],
    run_experts: RunExperts,
    x_1TD: jax.Array,
    choice: TokenChoice,
    is_overflow_TK: jax.Array,
    weights: ExpertWeights,
    *,
    like_1TD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the choices that found no room, if there are any on any device.

    One device's tokens after another's go to all devices along `axes`, in parts: the arrays are
    smaller than those of the buffers, next to which the compiler must hold them.

    Args:
      axes: mesh axes of experts.
      run_experts: what a device does with the tokens that it gets.
      x_1TD: the tokens of this device.
      choice: their experts.
      is_overflow_TK: which of these choices to run.
      weights: of this device's experts.
      like_1TD: an array of the shape, dtype and varying axes of the output.

    Returns:
      What experts made of those choices, zeros elsewhere, and the number of such choices of all
      devices of the mesh.
    """
    scope = expert_scope(axes, weights)
    no_expert = scope.num_devices * scope.num_experts
    experts_1TK = jnp.where(is_overflow_TK[None], choice.experts_BLK, no_expert)
    choice = dataclasses.replace(choice, experts_BLK=experts_1TK, max_choices=None)
    zeros_1TD = jnp.zeros_like(like_1TD)

    def run_all_devices(x_1TD, choice, weights):
        @jax.checkpoint
        def run_one_device(sum_1tD, x_1tD, choice_t, sender):
            is_mine = jax.lax.axis_index(axes) == sender
            x_1tD, choice_t = jax.tree.map(
                lambda a: jax.lax.psum(jnp.where(is_mine, a, 0), axes), (x_1tD, choice_t)
            )
            choice_t = choice_t.for_experts(scope.first, scope.num_experts)
            partial_1tD = run_experts(x_1tD, choice_t, weights)
            y_1tD = jax.lax.psum(partial_1tD.astype(jnp.float32), axes).astype(partial_1tD.dtype)
            return sum_1tD + jnp.where(is_mine, y_1tD, 0)

        def run_part(part):
            x_1tD, choice_t = part

            def add_device(sum_1tD, sender):
                return run_one_device(sum_1tD, x_1tD, choice_t, sender), None

            zeros_1tD = zeros_1TD[:, : x_1tD.shape[1]]
            return jax.lax.scan(add_device, zeros_1tD, jnp.arange(scope.num_devices))[0]

        num_parts = math.gcd(FALLBACK_PARTS, x_1TD.shape[1])
        parts = jax.tree.map(
            lambda a: a.reshape(1, num_parts, -1, a.shape[-1]).swapaxes(0, 1), (x_1TD, choice)
        )
        return jax.lax.map(run_part, parts).swapaxes(0, 1).reshape(zeros_1TD.shape)

    # The same number on all devices, which must take the same branch.
    num_here = unify_vma(is_overflow_TK.sum(dtype=jnp.float32), like_1TD)[0]
    num_overflow = jax.lax.psum(num_here, MESH_AXES)
    y_1TD = jax.lax.cond(
        num_overflow == 0,
        lambda *_: zeros_1TD,
        jax.checkpoint(run_all_devices),
        x_1TD,
        choice,
        weights,
    )
    # Devices along "tensor" have the same tokens: all of them counted the same choices.
    return y_1TD, num_overflow / jax.lax.axis_size("tensor")


def _slice_tokens(tree, first: int, size: int):
    return jax.tree.map(lambda a_1TX: a_1TX[:, first : first + size], tree)
