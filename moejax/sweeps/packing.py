"""Which arms of a sweep train together: those that one program can train, so many at a time."""

import itertools
from collections.abc import Sequence

from moejax.sweeps.arms import Arm
from moejax.training.packed.arms import program_of, trains_alone

Ids = tuple[str, ...]


def pack_arms(arms: Sequence[Arm], largest: int) -> tuple[Ids, ...]:
    """Groups arms into packs.

    Args:
      arms: of the sweep.
      largest: arms of a pack at most; 1 trains each alone, as arms are that no pack can hold.

    Returns:
      The ids of each pack; packs of one program follow one another and differ by one arm in size at
      most. Programs come in the order of their first arms.
    """
    by_program: dict[object, list[str]] = {}
    for arm in arms:
        by_program.setdefault(program_of(arm.config), []).append(arm.id)
    packs = []
    alone = {arm.id for arm in arms if trains_alone(arm.config)}
    for ids in by_program.values():
        number = len(ids) if ids[0] in alone else -(-len(ids) // largest)
        edges = [round(i * len(ids) / number) for i in range(number + 1)]
        packs += [tuple(ids[low:high]) for low, high in itertools.pairwise(edges)]
    return tuple(packs)
