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
        train = run.config.get(SECTION, {})
        seed = train.get(LEAF)
        key = _without_seed(run)
        if type(seed) is not int:
            groups[label] = {0: label}  # no seed: a setting of its own
        elif seed in groups.get(key, {}):
            groups[label] = {seed: label}  # the same run twice: a setting of its own
        else:
            group = groups.setdefault(key, {})
            group[seed] = label
    settings = []
    for label_of_seed in groups.values():
        name = _name(list(label_of_seed.values()))
        settings.append(Setting(name, label_of_seed))
    return settings


def difference(
    first: Mapping[int, float],
    second: Mapping[int, float],
    num_looks: int,
) -> Difference:
    """Returns the mean of second minus first over common seeds.

    Args:
      first: finite values by seed.
      second: of the other setting.
      num_looks: settings that are compared with the first.
    """
    ones = _measured(first)
    others = _measured(second)
    pairs = pair_up(ones, others)
    return mean_difference(pairs, num_looks)


def _measured(values: Mapping[int, float]) -> Measured:
    """Returns values by seed as those of one block: seeds alone tell pairs apart."""
    return {("", seed): value for seed, value in values.items()}


def _without_seed(run: Run) -> str:
    """Returns the configuration as text, equal for runs that differ in their seed alone."""
    config = {section: dict(leaves) for section, leaves in run.config.items()}
    train = config.get(SECTION, {})
    train.pop(LEAF, None)
    return json.dumps(config, sort_keys=True)


def _name(labels: Sequence[str]) -> str:
    """Returns the label of the only run, or of the first of several and how many there are."""
    first = labels[0]
    num_seeds = len(labels)
    return first if num_seeds == 1 else f"{first} ({num_seeds} seeds)"
