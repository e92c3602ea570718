"""Differences between arms of a sweep that have the same seed, and whether they exceed the noise.

A seed gives all settings the same order of the data and the same random numbers, so much of its
noise is common to all of them, and cancels in the difference of two arms with that seed. What
remains may still be common to all pairs of a seed, whatever the cells of the other axes: many cells
with one seed are one look at the noise, not many. So only seeds count as repetitions. Cells are
averaged within each seed, the standard error is that of these averages over seeds, and the interval
is Student's, with one degree of freedom less than there are seeds.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit

CONFIDENCE = 0.95

Measured = Mapping[tuple[Hashable, Hashable], float]
"""Values of arms by cell and seed."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval.

    Attributes:
      mean: NaN without a pair.
      se: standard error over seeds; NaN with fewer than two seeds, and so are `low` and `high`.
      low: the lower end of the interval.
      high: the upper end.
      num_pairs: of arms.
      num_seeds: of those pairs.
      num_left_out: pairs whose cell lacks a seed that the others have.
    """

    mean: float = math.nan
    se: float = math.nan
    low: float = math.nan
    high: float = math.nan
    num_pairs: int = 0
    num_seeds: int = 0
    num_left_out: int = 0

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def mean_difference(pairs_CS: Float[np.ndarray, "C S"], num_looks: int = 1) -> Difference:
    """Returns the mean of paired differences, with equal weight for each cell and each seed.

    Args:
      pairs_CS: a difference for each cell of the other axes and each seed; NaN where
        there is no pair.
      num_looks: differences that are looked at together: with probability 95 %, the intervals of
        all of them cover their true values (Bonferroni).
    """
    is_known_CS = np.isfinite(pairs_CS)
    cells, seeds = whole_block(is_known_CS)
    block_CS = pairs_CS[np.ix_(cells, seeds)]
    if not block_CS.size:
        return Difference()
    num_left_out = int(is_known_CS.sum()) - block_CS.size
    mean_S = block_CS.mean(axis=0)
    num_seeds = len(mean_S)
    found = Difference(
        mean=float(mean_S.mean()),
        num_pairs=block_CS.size,
        num_seeds=num_seeds,
        num_left_out=num_left_out,
    )
    if num_seeds < 2:
        return found
    se = float(mean_S.std(ddof=1)) / math.sqrt(num_seeds)
    half = se * student_quantile(num_seeds, num_looks)
    low = found.mean - half
    high = found.mean + half
    return dataclasses.replace(found, se=se, low=low, high=high)


def student_quantile(num_seeds: int, num_looks: int = 1) -> float:
    """Returns by how many standard errors an interval over seeds reaches to each side."""
    quantile = 1 - (1 - CONFIDENCE) / 2 / num_looks
    return float(stdtrit(num_seeds - 1, quantile))


def whole_block(is_known_CS: Bool[np.ndarray, "C S"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cells and the seeds of the largest block in which no pair is missing.

    A cell that lacks a seed would bring its own level into that seed's mean, which is no noise. Two
    seeds or more are preferred to any number of pairs with one, which say nothing of noise.
    """
    num_cells_S = is_known_CS.sum(axis=0)
    order_S = np.argsort(-num_cells_S, kind="stable")  # seeds with the most cells first
    none = np.zeros(0, int)
    best_rank = (False, 0)
    best = (none, none)
    for num_seeds in range(1, len(order_S) + 1):
        seeds = np.sort(order_S[:num_seeds])
        is_whole_C = is_known_CS[:, seeds].all(axis=1)
        cells = np.flatnonzero(is_whole_C)
        num_cells = len(cells)
        has_error = num_seeds > 1 and num_cells > 0
        rank = (has_error, num_cells * num_seeds)
        if rank >= best_rank:
            best_rank = rank
            best = (cells, seeds)
    return best


def pair_up(one: Measured, other: Measured) -> Float[np.ndarray, "C S"]:
    """Returns `other - one` by cell and seed; NaN where one of the two is missing."""
    cells, seeds = places_of(one, other)
    return as_table(other, cells, seeds) - as_table(one, cells, seeds)


def as_table(
    values: Measured,
    cells: Sequence[Hashable],
    seeds: Sequence[Hashable],
) -> Float[np.ndarray, "C S"]:
    """Returns values by cell and seed; NaN where there is none."""
    shape = (len(cells), len(seeds))
    table_CS = np.full(shape, np.nan)
    row_of = {cell: row for row, cell in enumerate(cells)}
    column_of = {seed: column for column, seed in enumerate(seeds)}
    for (cell, seed), value in values.items():
        row = row_of[cell]
        column = column_of[seed]
        table_CS[row, column] = value
    return table_CS


def places_of(*measured: Measured) -> tuple[list[Hashable], list[Hashable]]:
    """Returns all cells and all seeds, in the order of their appearance."""
    cells: dict[Hashable, None] = {}
    seeds: dict[Hashable, None] = {}
    for values in measured:
        for cell, seed in values:
            cells[cell] = None
            seeds[seed] = None
    return list(cells), list(seeds)
