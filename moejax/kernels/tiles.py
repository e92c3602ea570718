"""Loops over rows sorted by group, in tiles.

How much work each group has is known only when the program runs. A tile is a fixed number of
rows, so a group whose rows do not fill its tiles pays for rows it does not have. Several sizes of
tiles keep that waste small: as many of the largest as fit, and one more of the smallest size that
takes the rest. All loops are `lax.fori_loop`s; the program has the same size for any number of
groups.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

Carry = TypeVar("Carry")


FEW_ROWS = 4096
"""With fewer, arithmetic takes less time than compiling one loop body per size of tile."""


def tile_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Returns rising sizes of tiles for `num_rows` rows in `num_groups` groups.

    They depend on the mean group alone. Groups differ from it mostly by less than half of it, so
    sizes are close together around the mean. Products of fewer than 64 rows run at less than full
    speed, and those of more than 512 gain nothing.
    """
    mean = num_rows // num_groups
    if mean < 4 and num_rows < FEW_ROWS:
        return (2, 8)  # as in decoding: reading the matrices takes longer than multiplying by them
    if num_rows < FEW_ROWS:
        exponent = mean.bit_length() - 2
        quarter_to_half = 1 << exponent
        size = max(8, quarter_to_half)
        size = min(64, size)
        return (size, 4 * size)
    if mean >= 768:  # several of the largest, so that any rest is as likely
        return (32, 64, 128, 256, 384, 448, 480, 512)
    if mean >= 512:
        return (128, 256, 384, 448, 480, 512, 544, 576, 640)
    step = max(8, mean // 64 * 8)
    multiples = (2, 4, 6, 7, 8, 9, 10, 12, 16)
    return tuple(step * multiple for multiple in multiples)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of consecutive rows and their tiles.

    Attributes:
      sizes: of tiles, rising.
      num_active: how many groups have rows.
      order_E: those with rows, then the others, each in rising order.
      starts_E: first row of each group.
      ends_E: first row after each group.
      counts_ES: how many tiles of each size take the rest of a group: one 1, or zeros for a group
        without rows.
      num_full_E: how many of the largest take the rows before the rest.
    """

    sizes: tuple[int, ...]
    num_active: jax.Array
    order_E: jax.Array
    starts_E: jax.Array
    ends_E: jax.Array
    counts_ES: jax.Array
    num_full_E: jax.Array

    @classmethod
    def from_sizes(
        cls,
        group_sizes_E: Int[Array, "E"],
        starts_E: Int[Array, "E"],
        sizes: tuple[int, ...],
    ) -> "Groups":
        """Returns tiles for groups of these sizes, whose first rows are in rising order."""
        largest = sizes[-1]
        num_full_E = jnp.maximum(group_sizes_E - 1, 0) // largest
        rest_E = group_sizes_E - num_full_E * largest
        # Not as arrays of sizes: under `vmap` constants of the traced function count as batched,
        # which it may not have.
        is_rest = []
        for smaller, size in itertools.pairwise((0, *sizes)):
            is_above_E = rest_E > smaller
            is_rest.append(is_above_E & (rest_E <= size))
        has_rows_E = group_sizes_E > 0
        return cls(
            sizes=sizes,
            num_active=has_rows_E.sum(),
            order_E=jnp.argsort(group_sizes_E == 0),
            starts_E=starts_E,
            ends_E=starts_E + group_sizes_E,
            counts_ES=jnp.stack(is_rest, axis=1).astype(jnp.int32),
            num_full_E=num_full_E,
        )

    def for_each_active(
        self,
        body: Callable[[jax.Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Runs `body(group, carry)` for the groups that have rows, in rising order."""
        return self._for_each(0, self.num_active, body, carry)

    def for_each_empty(
        self,
        body: Callable[[jax.Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Runs `body(group, carry)` for the groups that have none."""
        num_groups = self.order_E.shape[0]
        return self._for_each(self.num_active, num_groups, body, carry)

    def _for_each(
        self,
        first: jax.Array | int,
        end: jax.Array | int,
        body: Callable[[jax.Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Runs `body(group, carry)` for the groups from place `first` to `end` of the order."""

        def one_group(i, carry):
            return body(self.order_E[i], carry)

        return lax.fori_loop(first, end, one_group, carry)

    def for_each_tile(
        self,
        group: jax.Array,
        rest: Callable[[int, jax.Array, Carry], Carry],
        full: Callable[[int, jax.Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Runs `rest(size, first row, carry)` for the last tile, then `full` for those before it.

        The last tile may reach past the group's end: what it writes there must not be needed by a
        group before it.
        """
        start = self.starts_E[group]
        num_full = self.num_full_E[group]
        largest = self.sizes[-1]
        for i, size in enumerate(self.sizes):
            # The row must depend on the loop's index: XLA would move the whole body out of a loop
            # that ignores it, and run it whether the loop does or not.
            def one(j, carry, size=size):
                row = start + (num_full + j) * largest
                return rest(size, row, carry)

            count = self.counts_ES[group, i]
            carry = lax.fori_loop(0, count, one, carry)

        def one_full(j, carry):
            row = start + j * largest
            return full(largest, row, carry)

        return lax.fori_loop(0, num_full, one_full, carry)


def dynamic_slice(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Returns `count` entries of the first axis, from `first` on."""
    return lax.dynamic_slice_in_dim(x, first, count)


def dynamic_update(x: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """Returns `x` with `part`, in its dtype, from entry `first` of the first axis on."""
    part = part.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, part, first, axis=0)
