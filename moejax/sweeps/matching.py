"""Matched arms: all have the size of the recipe, or train as long.

What a sweep varies changes the size of the model, and matching undoes that. It sets the width of
the experts, of the feed-forward layer in a dense arm, or the number of steps, so that each arm has
the recipe's number: of active parameters, of all parameters, or of FLOPs of training.
`planning.count` counts the entire model, with shared experts, latent projections and layers that
differ.
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
"""The largest relative deviation of an arm's number from the recipe's."""

CLOSE = 0.01
"""A width that is a multiple of 8 is taken if its relative deviation is at most this."""

NAMES = {"active_params": "active", "total_params": "total", "flops": "FLOPs per token"}


class MatchError(ValueError):
    """An arm that cannot have the number of the recipe."""


@dataclasses.dataclass(frozen=True)
class Matched:
    """An arm that has the number of the recipe, or nearly.

    Attributes:
      leaf: dotted key of what matching sets.
      value: to set it to; the arm's own where nothing had to change.
      is_changed: whether it differs from the arm's own.
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
      adjust: what is changed for it; "steps" goes with "flops" only.
      number: of the recipe: parameters, FLOPs per token or, to adjust steps, FLOPs of the
        whole training.
    """

    match: Match
    adjust: Adjust
    number: int

    @classmethod
    def from_recipe(cls, recipe: Config, match: Match, adjust: Adjust) -> "Target":
        """Returns the target of a recipe.

        Raises:
          MatchError: there is no such match, or it is one of parameters, which the number of steps
            does not change.
        """
        if match not in NAMES:
            raise MatchError(f"match={match} must be one of {', '.join(NAMES)}")
        if adjust == "steps" and match != "flops":
            raise MatchError(
                f"match={match} cannot be reached by adjust=steps, which change no parameters; "
                "use adjust=width, or match=flops"
            )
        return cls(match, adjust, _number(recipe, match, adjust))

    def match_arm(self, config: Config, overrides: Mapping[str, Any]) -> Matched:
        """Finds the width or the number of steps with which an arm comes closest.

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
                f"sets {leaf}={overrides[leaf]}, which match={self.match} adjusts; "
                "leave it out, or do not match"
            )
        before = _get(config, leaf)
        value = self._closest(config, leaf, before)
        deviation = self._deviation(config, leaf, value)
        text = f"{self._text(self._number_with(config, leaf, value))} ({_percent(deviation)})"
        if abs(deviation) > LARGEST_DEVIATION:
            remedy = "or train longer"
            if self.adjust == "width":
                remedy = f"or give the recipe a larger {leaf}, or do not match"
            raise MatchError(
                f"cannot have the recipe's {self._text(self.number)}: "
                f"with {leaf}={value}, the closest, it has {text}; leave it out, {remedy}"
            )
        return Matched(leaf, value, value != before, f"{leaf} {before} -> {value}, {text}")

    def _closest(self, config: Config, leaf: str, before: int) -> int:
        """Returns the value of a leaf with which an arm comes closest to the recipe's number.

        Args:
          config: the arm's.
          leaf: what is adjusted.
          before: the arm's own value, which is kept where no other comes closer.
        """
        exact = self._exact(config, leaf)
        parts = 1 if self.adjust == "steps" else max(1, config.mesh.tensor)
        multiples = [1] if self.adjust == "steps" else [math.lcm(8, parts), parts]
        best = before
        for multiple in multiples:
            lower = max(1, math.floor(exact / multiple)) * multiple
            candidates = [lower, lower + multiple]
            if before and before % parts == 0:
                candidates.append(before)
            best = min(candidates, key=lambda value: abs(self._deviation(config, leaf, value)))
            if abs(self._deviation(config, leaf, best)) <= CLOSE:
                break
        return best

    def _exact(self, config: Config, leaf: str) -> float:
        """Returns what the leaf would be without rounding.

        Every number grows linearly with the leaf, so two values of it determine the line.
        """
        low, high = 1, 1 + 2**20
        at_low = self._number_with(config, leaf, low)
        at_high = self._number_with(config, leaf, high)
        if at_low == at_high:
            raise MatchError(
                f"no layer has the width {leaf}, as moe.per_layer sets others; "
                f"leave d_expert out of moe.per_layer={config.moe.per_layer!r}, or do not match"
            )
        return low + (self.number - at_low) * (high - low) / (at_high - at_low)

    def _number_with(self, config: Config, leaf: str, value: int) -> int:
        return _number(_set(config, leaf, value), self.match, self.adjust)

    def _deviation(self, config: Config, leaf: str, value: int) -> float:
        return self._number_with(config, leaf, value) / self.number - 1

    def _text(self, number: int) -> str:
        what = "FLOPs of training" if self.adjust == "steps" else NAMES[self.match]
        return f"{what} {short(number)}"


def short(number: float) -> str:
    """Returns a number with three digits and a unit: 1.25 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        scaled = number / size
        if number < 0.9995 * size:
            continue
        # Bounds of what rounds to fewer digits before the point.
        if scaled >= 99.95:
            return f"{scaled:.0f} {unit}"
        if scaled >= 9.995:
            return f"{scaled:.1f} {unit}"
        return f"{scaled:.2f} {unit}"
    return str(round(number))


def _percent(deviation: float) -> str:
    rounded = round(100 * deviation, 1) + 0.0  # 0.0 is added so that there is no -0.0
    return f"{rounded:+.1f} %"


def training_flops(config: Config, counted: Count) -> int:
    """Returns the FLOPs of all tokens of a run, forward and backward."""
    tokens = config.data.seq_len * config.train.batch_size * config.train.num_steps
    return counted.flops_per_token * tokens


def _number(config: Config, match: Match, adjust: Adjust) -> int:
    """Returns what is matched: parameters, FLOPs per token, or FLOPs of training for steps."""
    counted = count(config)
    if adjust == "steps":
        return training_flops(config, counted)
    by_match = {
        "active_params": counted.active,
        "total_params": counted.total,
        "flops": counted.flops_per_token,
    }
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
    changed: Any = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})
