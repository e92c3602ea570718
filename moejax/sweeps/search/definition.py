"""What a search is: axes with choices or ranges, who draws points from them, and who ends bad arms early.

Pruners see those evaluations alone that all arms have at the same fraction of the schedule, by
number and not by step: arms of different lengths are compared at an equal fraction only. Draws
depend on the seed and the trial's number, not on who draws: workers never draw alike, and one
worker draws the same points again, also after it was restarted.
"""

import dataclasses
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
MEDIAN_AFTER_TRIALS = 5  # complete ones, before which the median says little
HALVING_FACTOR = 2
LOSS, BITS = "eval/loss", "eval/bits_per_byte"
LABELS = (bool, int, float, str, type(None))  # choices that Optuna keeps as they are


class StudyError(ValueError):
    """A search that cannot be set up or shared: one line that names the setting or storage and the remedy."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One searched leaf of the config: `values` to choose from, or numbers from `low` to `high`."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False

    def suggest(self, trial: "optuna.Trial") -> Any:
        """This axis's value in a trial, drawn where the trial has none yet."""
        if self.values:
            labels = [_label(value) for value in self.values]
            return self.values[labels.index(trial.suggest_categorical(self.key, labels))]
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.is_log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.is_log)

    def to_json(self) -> dict[str, Any]:
        """As JSON: the key with its values, or with its range."""
        if self.values:
            return {"key": self.key, "values": list(self.values)}
        return {"key": self.key, "low": self.low, "high": self.high, "log": self.is_log}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Axis":
        """The axis that `to_json` wrote."""
        if "values" in content:
            return cls(content["key"], tuple(content["values"]))
        return cls(content["key"], (), content["low"], content["high"], content["log"])


def search_axes(axes: Sequence[Choice | Range]) -> tuple[Axis, ...]:
    """The axes of a space as a study keeps them.

    Raises:
      StudyError: there is none, a key comes twice, a range is empty, a value is not JSON, or the
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
            "train.seed cannot be an axis of a search, which would pick the luckiest seed; "
            "search without it, then run the best points as a sweep over seeds"
        )
    return found


def _search_axis(axis: Choice | Range) -> Axis:
    if isinstance(axis, Choice):
        try:
            values = json.loads(json.dumps(list(axis.values), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StudyError(f"axis {axis.key}: its values must be JSON ({error})") from error
        if not values:
            raise StudyError(f"axis {axis.key} has no values; give at least one")
        return Axis(axis.key, tuple(values))
    low, high = axis.low, axis.high
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise StudyError(
            f"axis {axis.key} goes from {low} to {high}; the first must be the smaller, both finite"
        )
    if axis.is_log and low <= 0:
        raise StudyError(f"axis {axis.key} is logarithmic from {low}; it must begin above 0")
    return Axis(axis.key, (), low, high, axis.is_log)


def objective_of(axes: Sequence[Axis]) -> str:
    """The loss, or bits per byte where an axis changes what a token is: nats per token would favour short ones."""
    return BITS if token_keys(axis.key for axis in axes) else LOSS


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a study's workers need to know, kept in the study as JSON.

    Attributes:
      recipe: path of the recipe, as it was given.
      base: the recipe's leaves as a nested dict, to which a point's values are applied.
      axes: see `search_axes`.
      sampler: "random" or "tpe" (tree-structured Parzen estimator, Bergstra et al. 2011).
      pruner: "none", "median" (worse than the median of complete arms at the same fraction) or
        "halving" (asynchronous successive halving, Li et al. 2020, section 3.2: after the first,
        second, fourth... of the common evaluations the better half goes on).
      seed: of the draws.
      trials: number of points that the study evaluates.
      fractions: of the schedule at which every arm is evaluated, ascending: `place` counts them.
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
        for name, value, known in [
            ("sampler", self.sampler, SAMPLERS), ("pruner", self.pruner, PRUNERS),
            ("objective", self.objective, (LOSS, BITS)),
        ]:  # fmt: skip
            if value not in known:
                raise StudyError(f"{name}={value} is unknown; use one of {', '.join(known)}")
        if self.trials < 1:
            raise StudyError(f"trials={self.trials} must be at least 1")
        if self.seed < 0:
            raise StudyError(f"seed={self.seed} must not be negative")
        rising = all(
            one < other for one, other in zip(self.fractions, self.fractions[1:], strict=False)
        )
        if not (self.fractions and rising and self.fractions[0] > 0 and self.fractions[-1] <= 1):
            raise StudyError(
                f"fractions={list(self.fractions)} must ascend within ]0, 1]; a pruner acts at them"
            )
        if self.pruner != "none" and self.fractions[0] == 1:
            raise StudyError(
                f"pruner={self.pruner} has nothing to compare: before the end there is no fraction of the schedule at "
                "which every arm is evaluated; give a train.eval_every that makes one, or use pruner=none"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON, which the study keeps."""
        content = {**vars(self), "axes": [axis.to_json() for axis in self.axes]}
        return json.loads(json.dumps(content))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Definition":
        """The definition that `to_json` wrote.

        Raises:
          StudyError: it is not one.
        """
        try:
            axes = tuple(Axis.from_json(axis) for axis in content["axes"])
            return cls(**{**content, "axes": axes, "fractions": tuple(content["fractions"])})
        except (KeyError, TypeError) as error:
            raise StudyError(
                f"the study's definition cannot be read ({error}); was another version used?"
            ) from error

    def differing(self, other: "Definition") -> list[str]:
        """Names of the fields in which `other` differs."""
        mine, its = self.to_json(), other.to_json()
        for content in (mine, its):
            content["base"] = with_defaults(content["base"])
        return [name for name in mine if mine[name] != its[name]]

    def place(self, fraction: float) -> int | None:
        """The number of an evaluation among those that all arms have, from 1; None for one that others lack."""
        return self.fractions.index(fraction) + 1 if fraction in self.fractions else None

    def draw(self, study: "optuna.Study", trial: "optuna.Trial") -> dict[str, Any]:
        """The point of a trial: dotted key -> value."""
        study.sampler = self._sampler(trial.number)
        return {axis.key: axis.suggest(trial) for axis in self.axes}

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """The sampler of the trial with this number."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def new_pruner(self) -> "optuna.pruners.BasePruner":
        """What decides, at an evaluation, whether an arm ends."""
        import optuna

        if self.pruner == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_AFTER_TRIALS)
        if self.pruner == "halving":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=HALVING_FACTOR
            )
        return optuna.pruners.NopPruner()


def _label(value: Any) -> Any:
    """A choice as Optuna keeps it: lists and the like as JSON text."""
    return value if isinstance(value, LABELS) else json.dumps(value, sort_keys=True)
