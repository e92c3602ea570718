"""Groups runs into settings, and compares settings seed by seed.

Runs that differ in `train.seed` alone are one setting. With the same seed, two settings see the
same text in the same order. What a seed does to both of them cancels in their difference, so the
error of the difference is taken over equal seeds (`moejax.inspection.analysis.differences`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from moejax.inspection.analysis.differences import Difference, Measured, mean_difference, pair_up
from moejax.inspection.runs.run import Run

SECTION, LEAF = "train", "seed"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
      name: of the setting; that of its run, if it has one.
      runs: by seed.
    """

    name: str
    runs: Mapping[int, str]


def find_settings(runs: Mapping[str, Run]) -> list[Setting]:
    """Groups runs into settings, in their order.

    Args:
      runs: by label.
    """
    groups: dict[str, dict[int, str]] = {}
    for label, run in runs.items():
        seed = run.config.get(SECTION, {}).get(LEAF)
        key = _without_seed(run)
        if type(seed) is not int:
            groups[label] = {0: label}  # no seed: a setting of its own
        elif seed in groups.get(key, {}):
            groups[label] = {seed: label}  # the same run twice: a setting of its own
        else:
            groups.setdefault(key, {})[seed] = label
    return [Setting(_name(list(labels.values())), labels) for labels in groups.values()]


def difference(
    first: Mapping[int, float], second: Mapping[int, float], num_looks: int
) -> Difference:
    """Returns the mean of second minus first over common seeds.

    Args:
      first: finite values by seed.
      second: of the other setting.
      num_looks: settings that are compared with the first.
    """
    ones: Measured = {("", seed): value for seed, value in first.items()}
    others: Measured = {("", seed): value for seed, value in second.items()}
    return mean_difference(pair_up(ones, others), num_looks)


def _without_seed(run: Run) -> str:
    leaves = {section: dict(values) for section, values in run.config.items()}
    leaves.get(SECTION, {}).pop(LEAF, None)
    return json.dumps(leaves, sort_keys=True)


def _name(labels: Sequence[str]) -> str:
    """Returns the label of the only run, or of the first of several and how many there are."""
    return labels[0] if len(labels) == 1 else f"{labels[0]} ({len(labels)} seeds)"
