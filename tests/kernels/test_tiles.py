"""Tiles cover every row of every group once, and no more than the sizes at hand make necessary."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels import tiles
from moejax.kernels.tiles import FEW_ROWS, TABLE, Groups, TableError, guess_sizes, problem, read_table, tile_sizes

SIZES, NUM_GROUPS, NUM_ROWS = (8, 16, 32), 5, 400


@functools.partial(jax.jit, static_argnames="sizes")
def visits(group_sizes_E, sizes):
    """For each row the group that visits it, by a tile that ends there or not, and all rows that tiles take."""
    groups = Groups.of(group_sizes_E, jnp.cumsum(group_sizes_E) - group_sizes_E, sizes)

    def tile(e, size, row, carry):
        owner_R, visits_R, total = carry
        is_inside_R = (jnp.arange(NUM_ROWS) >= row) & (jnp.arange(NUM_ROWS) < jnp.minimum(row + size, groups.ends_E[e]))
        return jnp.where(is_inside_R, e, owner_R), visits_R + is_inside_R, total + size

    def one_group(e, carry):
        return groups.for_each_tile(e, functools.partial(tile, e), functools.partial(tile, e), carry)

    zeros_R = jnp.zeros(NUM_ROWS, jnp.int32)
    carry = groups.for_each_active(one_group, (zeros_R - 1, zeros_R, jnp.int32(0)))
    return *carry, groups.for_each_empty(lambda e, seen_E: seen_E.at[e].add(1), jnp.zeros(NUM_GROUPS, jnp.int32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 75), min_size=NUM_GROUPS, max_size=NUM_GROUPS))
def test_every_row_is_visited_once_by_its_group_in_as_few_rows_as_the_sizes_allow(sizes):
    owner_R, visits_R, total, empty_E = jax.device_get(visits(np.array(sizes, np.int32), SIZES))
    expected = [e for e, size in enumerate(sizes) for _ in range(size)]
    assert owner_R[: len(expected)].tolist() == expected and np.all(visits_R[: len(expected)] == 1)
    assert not np.any(visits_R[len(expected) :])
    assert empty_E.tolist() == [int(size == 0) for size in sizes]

    def rows_of(size):
        """The largest tile as often as something is left after it, and the smallest that takes the rest."""
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
def test_sizes_rise_and_lie_around_the_mean_with_few_of_them_where_there_are_few_rows(num_rows, num_groups):
    sizes, mean = guess_sizes(num_rows, num_groups), num_rows // num_groups
    assert list(sizes) == sorted(set(sizes)) and all(size % 2 == 0 for size in sizes)
    assert sizes[0] <= max(16, mean) and sizes[-1] >= min(256, mean)
    assert len(sizes) == 2 if num_rows < FEW_ROWS else 4 <= len(sizes) <= 9


def test_a_problem_in_the_table_has_its_sizes_on_its_platform_and_others_the_guess(tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"cpu": {problem(8192, 64, 512, 1024): [96, 128]}, "gpu": {"1:1:1:1": [4]}}))
    monkeypatch.setattr(tiles, "TABLE", table)
    assert tile_sizes(8192, 64, 512, 1024) == (96, 128)
    assert tile_sizes(8192, 64, 512, 1023) == guess_sizes(8192, 64)
    assert tile_sizes(1, 1, 1, 1) == guess_sizes(1, 1)


@pytest.mark.parametrize("sizes", [[], [128, 96], [0, 8], [8, 8], [8.5], ["8"], 8])
def test_a_table_with_impossible_sizes_is_refused_with_its_place(tmp_path, sizes):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"cpu": {"8192:64:512:1024": sizes}}))
    with pytest.raises(TableError, match=r"table.json: cpu 8192:64:512:1024: .* rising positive integers"):
        read_table(table)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cpu": 8}'])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, text):
    table = tmp_path / "table.json"
    table.write_text(text)
    with pytest.raises(TableError, match=r"table.json is no table of sizes"):
        read_table(table)


def test_the_table_that_is_installed_can_be_read():
    assert isinstance(read_table(TABLE), dict)
