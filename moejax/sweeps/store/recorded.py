"""Recognises the arms that a sweep's directory holds, by their configurations.

The ids of a directory are those with which its arms were recorded. Later versions of moejax may
make another id of the same configuration, or the same id of another: after a default has changed, a
recipe that leaves it open means something else. So a planned arm is compared with the recorded ones
leaf by leaf; leaves that were added since have their defaults there.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from moejax.config import Config, declared, format_value
from moejax.sweeps.arms import Arm, check_same, describe
from moejax.sweeps.ids import LEFT_OUT, hash_config

SHOWN = 3
"""Leaves that a message names."""


def with_recorded_ids(planned: Iterable[Arm], recorded: Mapping[str, Arm]) -> dict[str, Arm]:
    """Returns planned arms by id; those that are recorded have the id and hash of the record.

    Args:
      planned: arms as this version plans them.
      recorded: arms of a directory, by id.

    Raises:
      SweepError: two of the planned arms would have one id.
    """
    known = _by_configuration(recorded.values())
    arms: dict[str, Arm] = {}
    for arm in planned:
        same = known.get(arm.config_hash)
        if same is not None:
            arm = dataclasses.replace(arm, id=same.id, config_hash=same.config_hash)
        if arm.id in arms:
            check_same(arms[arm.id], arm)
        arms[arm.id] = arm
    return arms


def lost_arms(planned: Iterable[Arm], recorded: Mapping[str, Arm]) -> list[Arm]:
    """Returns the recorded arms whose configurations are not planned."""
    kept = _by_configuration(planned)
    known = _by_configuration(recorded.values())
    return [arm for content, arm in known.items() if content not in kept]


def explain_loss(lost: Arm, planned: Iterable[Arm]) -> str:
    """Returns what has changed of an arm that is not planned; "" if no arm of its point is."""
    same_point = [arm for arm in planned if arm.overrides == lost.overrides]
    if not same_point:
        return ""
    leaves = _differing_leaves(lost.config, same_point[0].config)
    shown = ", ".join(leaves[:SHOWN])
    if len(leaves) > SHOWN:
        shown += f" and {len(leaves) - SHOWN} more"
    point = describe(lost.overrides)
    return f"{point} was planned with {shown}"


def _by_configuration(arms: Iterable[Arm]) -> dict[str, Arm]:
    """Returns arms by this version's hash of their configurations."""
    return {hash_config(arm.config): arm for arm in arms}


def _differing_leaves(before: Config, after: Config) -> list[str]:
    """Returns a text for each leaf that differs: `moe.z_weight=0.1, which is 0.001 now`."""
    differing = []
    for key, each in declared().items():
        old = each.value(before)
        new = each.value(after)
        if old != new and key not in LEFT_OUT:
            differing.append(f"{key}={format_value(old)}, which is {format_value(new)} now")
    return differing
