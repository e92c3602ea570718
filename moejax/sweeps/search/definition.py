"""What a search is: axes with choices or ranges, a sampler of points, and a pruner of bad arms.

Pruners see only those evaluations that all arms have at the same fraction of the schedule, by
number and not by step: arms of different lengths are compared at an equal fraction only. Draws
depend on the seed and the trial's number, not on the worker: two workers never draw the same, and
one worker draws the same points again, also after it was restarted.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moejax.config import with_defaults
from moejax.inspection.runs.token_keys import token_keys
from moejax.sweeps.space import Choice, Range

if TYPE_CHECKING:  # an extra, imported where it is needed
    import optuna

SAMPLERS = ("random", "tpe")
PRUNERS = ("none", "median", "halving")
MEDIAN_AFTER_TRIALS = 5  # complete trials, before which the median says little
HALVING_FACTOR = 2
LOSS, BITS = "eval/loss", "eval/bits_per_byte"
LABELS = (bool, int, float, str, type(None))  # choices that Optuna keeps as they are


class StudyError(ValueError):
    """A search that cannot be set up or shared.

    The message is one line that names the setting or storage and the remedy.
    """


@dataclasses.dataclass(frozen=True)
class Axis:
    """One searched leaf of the config: `values` to choose from, or numbers from `low` to `high`."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False

    def suggest(self, trial: "optuna.Trial") -> Any:
        """Returns this axis's value in a trial, drawn where the trial has none yet."""
        if self.values:
            labels = [_label(value) for value in self.values]
            drawn = trial.suggest_categorical(self.key, labels)
            return self.values[labels.index(drawn)]
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(self.key, low, high, log=self.is_log)
        return trial.suggest_float(self.key, low, high, log=self.is_log)

    def to_json(self) -> dict[str, Any]:
        """Returns the axis as JSON: the key with its values, or with its range."""
        if self.values:
            return {"key": self.key, "values": list(self.values)}
        return {"key": self.key, "low": self.low, "high": self.high, "log": self.is_log}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Axis":
        """Returns the axis that `to_json` wrote."""
        if "values" in content:
            return cls(content["key"], tuple(content["values"]))
        return cls(content["key"], (), content["low"], content["high"], content["log"])


def search_axes(axes: Sequence[Choice | Range]) -> tuple[Axis, ...]:
    """Returns the axes of a space as a study keeps them.

    Raises:
      StudyError: there is none, two have one key, a range is empty, a value is not JSON, or the
        seed is an axis.
    """
    if not axes:
        raise StudyError(
            "a search needs at least one axis, such as optimizer.learning_rate=log:1e-4..1e-2"
        )
    found = tuple(_search_axis(axis) for axis in axes)
    keys = [axis.key for axis in found]
    for key in keys:
        if keys.count(key) > 1:
            raise StudyError(
                f"axis {key} is given {keys.count(key)} times; a search takes each key once"
            )
    if "train.seed" in keys:
        raise StudyError(
            "train.seed cannot be an axis of a search, which would choose the luckiest seed; "
            "search without it, then run the best points as a sweep over seeds"
        )
    return found


def _search_axis(axis: Choice | Range) -> Axis:
    if isinstance(axis, Choice):
        return _choice_axis(axis)
    low, high = axis.low, axis.high
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise StudyError(
            f"axis {axis.key} goes from {low} to {high}; "
            "the first must be the smaller, and both finite"
        )
    if axis.is_log and low <= 0:
        raise StudyError(f"axis {axis.key} is logarithmic from {low}; it must begin above 0")
    return Axis(axis.key, (), low, high, axis.is_log)


def _choice_axis(axis: Choice) -> Axis:
    try:
        values = json.loads(json.dumps(list(axis.values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StudyError(f"axis {axis.key}: its values must be JSON ({error})") from error
    if not values:
        raise StudyError(f"axis {axis.key} has no values; give at least one")
    return Axis(axis.key, tuple(values))


def objective_of(axes: Sequence[Axis]) -> str:
    """Returns what a search minimises: the loss, or bits per byte.

    Bits per byte where an axis changes what a token is: nats per token would favour short tokens.
    """
    return BITS if token_keys(axis.key for axis in axes) else LOSS


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a study's workers need to know, kept in the study as JSON.

    Attributes:
      recipe: path of the recipe, as it was given.
      base: the recipe's leaves as a nested dict, to which a point's values are applied.
      axes: see `search_axes`.
      sampler: "random" or "tpe" (tree-structured Parzen estimator, Bergstra et al. 2011).
      pruner: "none", "median" (ends arms that are worse than the median of complete arms at the
        same fraction) or "halving" (asynchronous successive halving, Li et al. 2020, section 3.2:
        after the first, second, fourth... of the common evaluations the better half goes on).
      seed: of the draws.
      trials: the number of points that the study evaluates.
      fractions: of the schedule at which every arm is evaluated, ascending: `place` numbers them.
      is_filtered: whether the space leaves points out by a predicate (`where`), which is code and
        is not kept.
      objective: what is minimised, and what pruners compare, see `objective_of`.
    """

    recipe: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    sampler: str
    pruner: str
    seed: int
    trials: int
    fractions: tuple[float, ...]
    is_filtered: bool
    objective: str = LOSS  # of studies that were made before there was another

    def __post_init__(self) -> None:
        _check_known("sampler", self.sampler, SAMPLERS)
        _check_known("pruner", self.pruner, PRUNERS)
        _check_known("objective", self.objective, (LOSS, BITS))
        if self.trials < 1:
            raise StudyError(f"trials={self.trials} must be at least 1")
        if self.seed < 0:
            raise StudyError(f"seed={self.seed} must not be negative")
        self._check_fractions()

    def _check_fractions(self) -> None:
        if not _ascend_to_one(self.fractions):
            raise StudyError(
                f"fractions={list(self.fractions)} must ascend within ]0, 1]; a pruner acts at them"
            )
        if self.pruner != "none" and self.fractions[0] == 1:
            raise StudyError(
                f"pruner={self.pruner} has nothing to compare: before the end there is no fraction "
                "of the schedule at which every arm is evaluated; "
                "give a train.eval_every that makes one, or use pruner=none"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the definition as JSON, which the study keeps."""
        content = {**vars(self), "axes": [axis.to_json() for axis in self.axes]}
        return json.loads(json.dumps(content))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Definition":
        """Returns the definition that `to_json` wrote.

        Raises:
          StudyError: `content` is no definition.
        """
        try:
            axes = tuple(Axis.from_json(axis) for axis in content["axes"])
            return cls(**{**content, "axes": axes, "fractions": tuple(content["fractions"])})
        except (KeyError, TypeError) as error:
            raise StudyError(
                f"the study's definition cannot be read ({error}); was another version used?"
            ) from error

    def differing(self, other: "Definition") -> list[str]:
        """Returns the names of the fields in which `other` differs."""
        own_values = self.to_json()
        other_values = other.to_json()
        # A leaf that the other's version did not have is at its default.
        own_values["base"] = with_defaults(own_values["base"])
        other_values["base"] = with_defaults(other_values["base"])
        return [name for name in own_values if own_values[name] != other_values[name]]

    def place(self, fraction: float) -> int | None:
        """Returns the number of an evaluation among those that all arms have, from 1.

        None for an evaluation that other arms do not have.
        """
        return self.fractions.index(fraction) + 1 if fraction in self.fractions else None

    def draw(self, study: "optuna.Study", trial: "optuna.Trial") -> dict[str, Any]:
        """Returns the point of a trial: values by dotted key."""
        study.sampler = self._sampler(trial.number)
        return {axis.key: axis.suggest(trial) for axis in self.axes}

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """Returns the sampler of the trial with this number."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def new_pruner(self) -> "optuna.pruners.BasePruner":
        """Returns what decides, at an evaluation, whether an arm ends."""
        import optuna

        if self.pruner == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_AFTER_TRIALS)
        if self.pruner == "halving":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=HALVING_FACTOR
            )
        return optuna.pruners.NopPruner()


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise StudyError(f"{name}={value} is unknown; use one of {', '.join(known)}")


def _ascend_to_one(fractions: Sequence[float]) -> bool:
    """Whether there are fractions, which ascend within ]0, 1]."""
    if not fractions or fractions[0] <= 0 or fractions[-1] > 1:
        return False
    return all(before < after for before, after in itertools.pairwise(fractions))


def _label(value: Any) -> Any:
    """Returns a choice as Optuna keeps it: lists and dicts as JSON text."""
    return value if isinstance(value, LABELS) else json.dumps(value, sort_keys=True)
