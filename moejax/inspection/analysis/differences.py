"""Differences between arms of a sweep that have the same seed, and how far they can be told from noise.

A seed gives all settings the same order of the data and the same random numbers, so much of its
noise is common to all of them, and cancels in the difference of two arms with that seed. What is
left may still be common to all pairs of a seed, whatever the cells of the other axes: many cells
with one seed are one look at the noise, not many. So seeds alone count as repetitions. Cells are
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
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def mean_difference(pairs_CS: Float[np.ndarray, "C S"], num_looks: int = 1) -> Difference:
    """The mean of paired differences, each cell and each seed of the same weight.

    Args:
      pairs_CS: a difference for each cell of the other axes and each seed; NaN where
        there is no pair.
      num_looks: differences that are looked at together: the intervals of all of them cover with 95
        % (Bonferroni).
    """
    is_known_CS = np.isfinite(pairs_CS)
    cells, seeds = whole_block(is_known_CS)
    block_CS = pairs_CS[np.ix_(cells, seeds)]
    if not block_CS.size:
        return Difference()
    num_left_out = int(is_known_CS.sum()) - block_CS.size
    of_seed_S = block_CS.mean(axis=0)
    mean, num_seeds = float(of_seed_S.mean()), len(of_seed_S)
    if num_seeds < 2:
        return Difference(
            mean, num_pairs=block_CS.size, num_seeds=num_seeds, num_left_out=num_left_out
        )
    se = float(of_seed_S.std(ddof=1)) / math.sqrt(num_seeds)
    half = se * student_quantile(num_seeds, num_looks)
    return Difference(mean, se, mean - half, mean + half, block_CS.size, num_seeds, num_left_out)


def student_quantile(num_seeds: int, num_looks: int = 1) -> float:
    """By how many standard errors an interval over seeds reaches to each side."""
    return float(stdtrit(num_seeds - 1, 1 - (1 - CONFIDENCE) / 2 / num_looks))


def whole_block(is_known_CS: Bool[np.ndarray, "C S"]) -> tuple[np.ndarray, np.ndarray]:
    """The indices of cells and seeds that all have one another, and hold as many pairs as possible.

    A cell that lacks a seed would bring its own level into that seed's mean, which is no noise. Two
    seeds or more are preferred to any number of pairs with one, which say nothing of noise.
    """
    by_size = np.argsort(
        -is_known_CS.sum(axis=0), kind="stable"
    )  # seeds, those with the most cells first
    best: tuple[bool, int, np.ndarray, np.ndarray] | None = None
    for number in range(1, len(by_size) + 1):
        seeds = np.sort(by_size[:number])
        cells = np.flatnonzero(is_known_CS[:, seeds].all(axis=1))
        rank = (number > 1 and len(cells) > 0, len(cells) * number)
        if best is None or rank >= best[:2]:
            best = (*rank, cells, seeds)
    return (np.zeros(0, int), np.zeros(0, int)) if best is None else best[2:]


def pair_up(one: Measured, other: Measured) -> Float[np.ndarray, "C S"]:
    """`other - one` by cell and seed; NaN where one of the two is missing."""
    cells, seeds = places_of(one, other)
    return as_table(other, cells, seeds) - as_table(one, cells, seeds)


def as_table(
    values: Measured, cells: Sequence[Hashable], seeds: Sequence[Hashable]
) -> Float[np.ndarray, "C S"]:
    """Values by cell and seed; NaN where there is none."""
    table_CS = np.full((len(cells), len(seeds)), np.nan)
    rows = {cell: i for i, cell in enumerate(cells)}
    columns = {seed: i for i, seed in enumerate(seeds)}
    for (cell, seed), value in values.items():
        table_CS[rows[cell], columns[seed]] = value
    return table_CS


def places_of(*measured: Measured) -> tuple[list[Hashable], list[Hashable]]:
    """All cells and all seeds, in the order of their appearance."""
    keys = dict.fromkeys(key for values in measured for key in values)
    return list(dict.fromkeys(cell for cell, _ in keys)), list(
        dict.fromkeys(seed for _, seed in keys)
    )
