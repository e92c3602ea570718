"""Tiles cover every row of every group once, and no more than the sizes at hand make necessary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels.tiles import FEW_ROWS, Groups, tile_sizes

SIZES, NUM_GROUPS, NUM_ROWS = (8, 16, 32), 5, 400


@functools.partial(jax.jit, static_argnames="sizes")
def visits(group_sizes_E, sizes):
    """For each row the group that visits it, by a tile that ends there or not, and all rows that
    tiles take.
    """
    groups = Groups.from_sizes(group_sizes_E, jnp.cumsum(group_sizes_E) - group_sizes_E, sizes)

    def tile(e, size, row, carry):
        owner_R, visits_R, total = carry
        is_inside_R = (jnp.arange(NUM_ROWS) >= row) & (
            jnp.arange(NUM_ROWS) < jnp.minimum(row + size, groups.ends_E[e])
        )
        return jnp.where(is_inside_R, e, owner_R), visits_R + is_inside_R, total + size

    def one_group(e, carry):
        return groups.for_each_tile(
            e, functools.partial(tile, e), functools.partial(tile, e), carry
        )

    zeros_R = jnp.zeros(NUM_ROWS, jnp.int32)
    carry = groups.for_each_active(one_group, (zeros_R - 1, zeros_R, jnp.int32(0)))
    return *carry, groups.for_each_empty(
        lambda e, seen_E: seen_E.at[e].add(1), jnp.zeros(NUM_GROUPS, jnp.int32)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 75), min_size=NUM_GROUPS, max_size=NUM_GROUPS))
def test_every_row_is_visited_once_by_its_group_in_as_few_rows_as_the_sizes_allow(sizes):
    owner_R, visits_R, total, empty_E = jax.device_get(visits(np.array(sizes, np.int32), SIZES))
    expected = [e for e, size in enumerate(sizes) for _ in range(size)]
    assert owner_R[: len(expected)].tolist() == expected and np.all(visits_R[: len(expected)] == 1)
    assert not np.any(visits_R[len(expected) :])
    assert empty_E.tolist() == [int(size == 0) for size in sizes]

    def rows_of(size):
        """The largest tile as often as something is left after it, and the smallest that takes the
        rest.
        """
        taken = 0
        while size - taken > SIZES[-1]:
            taken += SIZES[-1]
        return taken + min(s for s in SIZES if s >= size - taken) if size else 0

    assert total == sum(map(rows_of, sizes))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 400])
def test_a_group_at_the_border_of_a_tile_is_covered(size):
    for e in (0, NUM_GROUPS - 1):
        sizes = np.zeros(NUM_GROUPS, np.int32)
        sizes[e] = size
        owner_R, visits_R, _, _ = jax.device_get(visits(sizes, SIZES))
        assert visits_R.tolist() == [1] * size + [0] * (NUM_ROWS - size)
        assert owner_R.tolist() == [e] * size + [-1] * (NUM_ROWS - size)


@pytest.mark.parametrize("num_rows", [1, 2, 100, FEW_ROWS - 1, FEW_ROWS, 8192, 32768, 10**6])
@pytest.mark.parametrize("num_groups", [1, 8, 64, 256, 10_000])
def test_sizes_rise_and_lie_around_the_mean_with_few_of_them_where_there_are_few_rows(
    num_rows, num_groups
):
    sizes, mean = tile_sizes(num_rows, num_groups), num_rows // num_groups
    assert list(sizes) == sorted(set(sizes)) and all(size % 2 == 0 for size in sizes)
    assert sizes[0] <= max(16, mean) and sizes[-1] >= min(256, mean)
    assert len(sizes) == 2 if num_rows < FEW_ROWS else 4 <= len(sizes) <= 9
