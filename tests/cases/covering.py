"""Covering arrays: few cases in which every pair of values of two factors occurs.

Most mistakes need one value of a factor, or two values together: the full product of all factors
is for the long suite.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairs_of(case: Case) -> set[tuple]:
    """Returns the pairs of values, with the names of their factors."""
    return set(itertools.combinations(case.items(), 2))


def covering(
    factors: Mapping[str, Sequence[Any]], is_possible: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Returns cases in which every pair occurs that occurs in a possible case.

    Greedy: the next case is the one with most of the pairs that are still missing, the first of
    several in the order of the product. So the cases are the same in every process.
    """
    product = (dict(zip(factors, row, strict=True)) for row in itertools.product(*factors.values()))
    cases = [case for case in product if is_possible(case)]
    bits: dict[tuple, int] = {}  # of each pair, a bit of a number: sets of pairs are too slow
    masks = []
    for case in cases:
        masks.append(sum(bits.setdefault(pair, 1 << len(bits)) for pair in pairs_of(case)))
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        found = [(mask & missing).bit_count() for mask in masks]
        best = found.index(max(found))
        chosen.append(cases[best])
        missing &= ~masks[best]
    return chosen


def name_of(case: Case) -> str:
    """Returns what the case is called among the tests."""
    return ", ".join(f"{factor} {value}" for factor, value in case.items())
