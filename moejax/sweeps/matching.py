"""Matched arms: what a sweep varies changes how large a model is, and matching takes that back.

Each arm gets experts of such a width, a dense one a feed-forward layer of such a width, or so many
steps, that it has the number of the recipe: active parameters, all parameters, or FLOPs of
training. What is counted is the whole model, with shared experts, latent projections and layers
that differ, by `planning.count`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from moejax.config import Config
from moejax.planning.count import Count, count

Match = Literal["", "active_params", "total_params", "flops"]
Adjust = Literal["width", "steps"]

LARGEST_DEVIATION = 0.05
"""Of an arm's number from the recipe's."""

CLOSE = 0.01
"""A width that is a multiple of 8 is taken if it comes as close as this."""

NAMES = {"active_params": "active", "total_params": "total", "flops": "FLOPs per token"}


class MatchError(ValueError):
    """An arm that cannot have the number of the recipe."""


@dataclasses.dataclass(frozen=True)
class Matched:
    """An arm that has the number of the recipe, or nearly.

    Attributes:
      leaf: dotted key of what matching sets.
      value: to set it to; the arm's own where nothing had to change.
      is_changed: whether it is another than the arm's own.
      change: a line that says what changed, without the arm's overrides.
    """

    leaf: str
    value: int
    is_changed: bool
    change: str


@dataclasses.dataclass(frozen=True)
class Target:
    """What arms are matched with.

    Attributes:
      match: what is equal, not "".
      adjust: what is changed for it; "steps" goes with "flops" alone.
      number: of the recipe: parameters, FLOPs per token or, to adjust steps, FLOPs of the
        whole training.
    """

    match: Match
    adjust: Adjust
    number: int

    @classmethod
    def from_recipe(cls, recipe: Config, match: Match, adjust: Adjust) -> "Target":
        """The recipe's number.

        Raises:
          MatchError: there is no such number, or it is one of parameters, which steps
            do not change.
        """
        if match not in NAMES:
            raise MatchError(f"match={match} must be one of {', '.join(NAMES)}")
        if adjust == "steps" and match != "flops":
            raise MatchError(
                f"match={match} cannot be reached by adjust=steps, which change no parameters; use adjust=width, or "
                "match=flops"
            )
        return cls(match, adjust, _number(recipe, match, adjust))

    def match_arm(self, config: Config, overrides: Mapping[str, Any]) -> Matched:
        """Finds the width or the steps with which an arm comes closest.

        Widths are multiples of `mesh.tensor`, and of 8 where that comes within a hundredth.

        Args:
          config: the arm's, resolved.
          overrides: what the arm sets itself.

        Raises:
          MatchError: it sets what matching would change, or cannot come close.
        """
        leaf = _leaf(config, self.adjust)
        if leaf in overrides:
            raise MatchError(
                f"sets {leaf}={overrides[leaf]}, which match={self.match} adjusts; leave it out, or do not match"
            )
        before = _get(config, leaf)
        value = self._closest(config, leaf, before)
        deviation = self._deviation(config, leaf, value)
        reached = _number(_set(config, leaf, value), self.match, self.adjust)
        if abs(deviation) > LARGEST_DEVIATION:
            raise MatchError(
                f"cannot have the recipe's {self._text(self.number)}: with {leaf}={value}, the closest, it has "
                f"{self._text(reached)} ({_percent(deviation)}); leave it out, "
                + (
                    "or train longer"
                    if self.adjust == "steps"
                    else f"or give the recipe a larger {leaf}, or do not match"
                )
            )
        change = f"{leaf} {before} -> {value}, {self._text(reached)} ({_percent(deviation)})"
        return Matched(leaf, value, value != before, change)

    def _closest(self, config: Config, leaf: str, before: int) -> int:
        exact = self._exact(config, leaf)
        parts = 1 if self.adjust == "steps" else max(1, config.mesh.tensor)
        best = before
        for step in (1,) if self.adjust == "steps" else (math.lcm(8, parts), parts):
            lower = max(1, math.floor(exact / step)) * step
            candidates = [lower, lower + step] + (
                [before] if before and before % parts == 0 else []
            )
            best = min(candidates, key=lambda value: abs(self._deviation(config, leaf, value)))
            if abs(self._deviation(config, leaf, best)) <= CLOSE:
                break
        return best

    def _exact(self, config: Config, leaf: str) -> float:
        """What the leaf would be without rounding: every number is a constant and a multiple of it."""
        low, high = 1, 1 + 2**20
        at_low, at_high = (
            _number(_set(config, leaf, value), self.match, self.adjust) for value in (low, high)
        )
        if at_low == at_high:
            raise MatchError(
                f"no layer has the width {leaf}, as moe.per_layer sets others; leave d_expert out of "
                f"moe.per_layer={config.moe.per_layer!r}, or do not match"
            )
        return low + (self.number - at_low) * (high - low) / (at_high - at_low)

    def _deviation(self, config: Config, leaf: str, value: int) -> float:
        return _number(_set(config, leaf, value), self.match, self.adjust) / self.number - 1

    def _text(self, number: int) -> str:
        what = "FLOPs of training" if self.adjust == "steps" else NAMES[self.match]
        return f"{what} {short(number)}"


def short(number: float) -> str:
    """Three digits and a unit: 1.25 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return str(round(number))


def _percent(deviation: float) -> str:
    return f"{round(100 * deviation, 1) + 0.0:+.1f} %"  # 0.0 is added so that there is no -0.0


def training_flops(config: Config, counted: Count) -> int:
    """FLOPs of all tokens of a run, forward and backward."""
    return (
        counted.flops_per_token
        * config.data.seq_len
        * config.train.batch_size
        * config.train.num_steps
    )


def _number(config: Config, match: Match, adjust: Adjust) -> int:
    counted = count(config)
    if adjust == "steps":
        return training_flops(config, counted)
    by_match = {
        "active_params": counted.active, "total_params": counted.total, "flops": counted.flops_per_token
    }  # fmt: skip
    return by_match[match]


def _leaf(config: Config, adjust: Adjust) -> str:
    if adjust == "steps":
        return "train.num_steps"
    return "moe.d_expert" if config.moe.num_experts else "model.d_ff"


def _get(config: Config, leaf: str) -> int:
    section, name = leaf.split(".")
    return getattr(getattr(config, section), name)


def _set(config: Config, leaf: str, value: int) -> Config:
    section, name = leaf.split(".")
    changes: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **{name: value})
    }
    return dataclasses.replace(config, **changes)
