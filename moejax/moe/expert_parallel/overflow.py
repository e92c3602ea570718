"""Sending tokens in chunks, and the fallback for choices that found no room in a buffer.

Nothing is dropped: choices without room go to all devices, one device's after another's, so that
the fallback costs time and no more memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.kernels.vma import unify_vma
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.expert_parallel.strategy import EXCHANGED, DeviceInputs, RunExperts
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
    num_local = weights.down_EFD.shape[0]
    num_inner = math.prod(jax.lax.axis_size(axis) for axis in inner_axes)
    num_experts = num_inner * num_local
    num_devices = jax.lax.axis_size(axes)
    me = jax.lax.axis_index(axes)
    return ExpertScope(num_devices, num_experts, first=me * num_experts)


def receivers(choice: TokenChoice, scope: ExpertScope) -> jax.Array:
    """Returns the device of each choice's expert, `[T, K]`; n where the choice is of no expert."""
    experts_TK = choice.experts_BLK[0]
    device_TK = experts_TK // scope.num_experts
    return jnp.minimum(device_TK, scope.num_devices)


def send_in_chunks(
    make_round_trip: Callable[[int], RoundTrip],
    num_chunks: int,
    inputs: DeviceInputs,
) -> tuple[jax.Array, jax.Array]:
    """Sends tokens to their experts and back, in chunks; then what found no room.

    Args:
      make_round_trip: makes a round trip for that many tokens of every device.
      num_chunks: wanted; as many as divide the tokens are taken.
      inputs: of this device.

    Returns:
      The combined outputs, and how many choices of all devices went through the fallback.
    """
    tokens = inputs.as_one_sequence()
    num_tokens = tokens.x_bLD.shape[1]
    chunk_size = num_tokens // math.gcd(num_chunks, num_tokens)
    round_trip = make_round_trip(chunk_size)
    if chunk_size < num_tokens:
        # What the experts of one chunk keep for the backward pass is computed again there, just
        # before it is used: the memory of one chunk serves all.
        policy = jax.checkpoint_policies.save_only_these_names(EXCHANGED)
        round_trip = jax.checkpoint(round_trip, policy=policy)
    returned = []
    for first in range(0, num_tokens, chunk_size):
        x_1tD = _slice_tokens(tokens.x_bLD, first, chunk_size)
        choice_t = _slice_tokens(tokens.assignment, first, chunk_size)
        returned.append(round_trip(x_1tD, choice_t, inputs.weights))
    y_1TD = jnp.concatenate([chunk.y_1TD for chunk in returned], axis=1)
    is_overflow_TK = jnp.concatenate([chunk.is_overflow_TK for chunk in returned])
    overflow_1TD, num_overflow = run_overflow(EXPERT_AXES, tokens, is_overflow_TK, like_1TD=y_1TD)
    num_overflow += sum(chunk.num_overflow for chunk in returned)
    y_1TD = y_1TD + overflow_1TD
    return y_1TD.reshape(inputs.x_bLD.shape), num_overflow


def run_overflow(
    axes: tuple[str, ...],
    tokens: DeviceInputs,
    is_overflow_TK: jax.Array,
    *,
    like_1TD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the choices that found no room, if there are any on any device.

    One device's tokens after another's go to all devices along `axes`, in parts: the arrays are
    smaller than those of the buffers, next to which the compiler must hold them.

    Args:
      axes: mesh axes of experts.
      tokens: of this device, in one sequence, with their choices.
      is_overflow_TK: which of these choices to run.
      like_1TD: an array of the shape, dtype and varying axes of the output.

    Returns:
      What experts made of those choices, zeros elsewhere, and the number of such choices of all
      devices of the mesh.
    """
    scope = expert_scope(axes, tokens.weights)
    choice = _keep_overflow(tokens.assignment, is_overflow_TK, scope)
    zeros_1TD = jnp.zeros_like(like_1TD)
    fallback = _Fallback(axes, scope, tokens.run_experts, zeros_1TD)
    # The same number on all devices, which must take the same branch.
    num_here = is_overflow_TK.sum(dtype=jnp.float32)
    num_here, _ = unify_vma(num_here, like_1TD)
    num_overflow = jax.lax.psum(num_here, MESH_AXES)
    y_1TD = jax.lax.cond(
        num_overflow == 0,
        lambda *_: zeros_1TD,
        jax.checkpoint(fallback.run_all_devices),
        tokens.x_bLD,
        choice,
        tokens.weights,
    )
    # Devices along "tensor" have the same tokens: all of them counted the same choices.
    return y_1TD, num_overflow / jax.lax.axis_size("tensor")


def _keep_overflow(
    choice: TokenChoice,
    is_overflow_TK: jax.Array,
    scope: ExpertScope,
) -> TokenChoice:
    """Returns the choices that found no room; all others are of no expert."""
    no_expert = scope.num_devices * scope.num_experts
    experts_1TK = jnp.where(is_overflow_TK[None], choice.experts_BLK, no_expert)
    return dataclasses.replace(choice, experts_BLK=experts_1TK, max_choices=None)


@dataclasses.dataclass(frozen=True)
class _Fallback:
    """Runs the choices of all devices, one device after another.

    Attributes:
      axes: mesh axes of experts.
      scope: which experts the devices along them have.
      run_experts: what a device does with the tokens that it gets.
      zeros_1TD: where sums begin.
    """

    axes: tuple[str, ...]
    scope: ExpertScope
    run_experts: RunExperts
    zeros_1TD: jax.Array

    def run_all_devices(
        self,
        x_1TD: jax.Array,
        choice: TokenChoice,
        weights: ExpertWeights,
    ) -> jax.Array:
        """Returns what all devices made of this one's choices."""
        num_parts = math.gcd(FALLBACK_PARTS, x_1TD.shape[1])

        def split(a_1TX: jax.Array) -> jax.Array:
            width = a_1TX.shape[-1]
            a_1PtX = a_1TX.reshape(1, num_parts, -1, width)
            return a_1PtX.swapaxes(0, 1)

        def run_part(part: tuple[jax.Array, TokenChoice]) -> jax.Array:
            return self._run_part(*part, weights)

        parts = jax.tree.map(split, (x_1TD, choice))
        y_P1tD = jax.lax.map(run_part, parts)
        y_1PtD = y_P1tD.swapaxes(0, 1)
        return y_1PtD.reshape(self.zeros_1TD.shape)

    def _run_part(
        self,
        x_1tD: jax.Array,
        choice_t: TokenChoice,
        weights: ExpertWeights,
    ) -> jax.Array:
        """Returns the outputs of one part of the tokens."""
        # Nothing is kept between devices: the backward pass sends the tokens of each again.
        run_one_device = jax.checkpoint(functools.partial(self._run_one_device, weights))

        def add_device(sum_1tD, sender):
            sum_1tD = run_one_device(sum_1tD, x_1tD, choice_t, sender)
            return sum_1tD, None

        zeros_1tD = self.zeros_1TD[:, : x_1tD.shape[1]]
        sender_n = jnp.arange(self.scope.num_devices)
        y_1tD, _ = jax.lax.scan(add_device, zeros_1tD, sender_n)
        return y_1tD

    def _run_one_device(
        self,
        weights: ExpertWeights,
        sum_1tD: jax.Array,
        x_1tD: jax.Array,
        choice_t: TokenChoice,
        sender: jax.Array,
    ) -> jax.Array:
        """Runs the tokens of `sender` on all devices; it adds their outputs to its own sum."""
        is_mine = jax.lax.axis_index(self.axes) == sender

        def broadcast(a: jax.Array) -> jax.Array:
            mine = jnp.where(is_mine, a, 0)
            return jax.lax.psum(mine, self.axes)

        x_1tD, choice_t = jax.tree.map(broadcast, (x_1tD, choice_t))
        local = choice_t.for_experts(self.scope.first, self.scope.num_experts)
        partial_1tD = self.run_experts(x_1tD, local, weights)
        dtype = partial_1tD.dtype
        partial_1tD = partial_1tD.astype(jnp.float32)
        y_1tD = jax.lax.psum(partial_1tD, self.axes)
        y_1tD = y_1tD.astype(dtype)
        return sum_1tD + jnp.where(is_mine, y_1tD, 0)


def _slice_tokens(tree, first: int, size: int):
    """Returns `size` tokens from `first` on, of every array of a tree."""
    return jax.tree.map(lambda a_1TX: a_1TX[:, first : first + size], tree)
