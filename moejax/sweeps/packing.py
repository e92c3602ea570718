"""Which arms of a sweep train together: those of one program, up to a largest number."""

import itertools
import math
from collections.abc import Sequence

from moejax.sweeps.arms import Arm
from moejax.training.packed.arms import program_of, trains_alone

Ids = tuple[str, ...]


def pack_arms(arms: Sequence[Arm], largest: int) -> tuple[Ids, ...]:
    """Groups arms into packs.

    Args:
      arms: of the sweep.
      largest: the number of arms of a pack, at most. With 1 each arm trains alone; arms that no
        pack can hold always do.

    Returns:
      The ids of each pack. Packs of one program follow one another, and their sizes differ by one
      at most. Programs are in the order of their first arms.
    """
    by_program: dict[object, list[str]] = {}
    for arm in arms:
        by_program.setdefault(program_of(arm.config), []).append(arm.id)
    alone = {arm.id for arm in arms if trains_alone(arm.config)}
    packs: list[Ids] = []
    for ids in by_program.values():
        # Arms of one program either all train alone or none does.
        num_packs = math.ceil(len(ids) / largest)
        if ids[0] in alone:
            num_packs = len(ids)
        packs += _split_evenly(ids, num_packs)
    return tuple(packs)


def _split_evenly(ids: Sequence[str], num_packs: int) -> list[Ids]:
    edges = [round(i * len(ids) / num_packs) for i in range(num_packs + 1)]
    return [tuple(ids[low:high]) for low, high in itertools.pairwise(edges)]
