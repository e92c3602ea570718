"""How knobs change over training: one leaf per knob, which names a schedule of its factor."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from moejax.config.errors import ConfigError, format_value, nearest, require
from moejax.config.loss_specs import LossSpec, with_loss_weights
from moejax.config.router_rules import ROUTER_RULES
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import Scaled
from moejax.config.sections.moe import MoeConfig


def _of(key: str) -> Any:
    """Returns the leaf that names the schedule of another leaf."""
    return leaf("constant", f"schedule of the factor on {key}", needs=Scaled(key))


def _of_weight(name: str, spec: LossSpec) -> Any:
    """Returns the leaf that names the schedule of the weight of a loss."""
    return _of(f"moe.{name}")


@dataclasses.dataclass(frozen=True)
@with_loss_weights(str, _of_weight)
class ScheduleConfig:
    """Schedules of factors; each leaf has the name of the leaf of `moe` that it scales.

    The weight of every auxiliary loss of `LOSS_SPECS` has one, such as `balance_weight`.

    A schedule is "constant", or a name with its arguments:

    - "linear:END", "cosine:END", "exponential:END": from 1 to END over the whole run;
    - "step:FRACTION:VALUE": 1, then VALUE after that fraction of the run;
    - "warmup:FRACTION": from 0 to 1 over that fraction of the run.
    """

    capacity_factor: str = _of("moe.capacity_factor")
    top_k: str = _of("moe.top_k")
    jitter: str = _of("moe.jitter")
    noise_scale: str = _of("moe.noise_scale")
    bias_rate: str = _of("moe.bias_rate")
    expert_dropout: str = _of("moe.expert_dropout")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A parsed schedule of a factor.

    Attributes:
      name: as in `ARGUMENTS`.
      end: the factor at the end of the run (1 for warmup).
      fraction: of the run, for step and warmup.
    """

    name: str
    end: float = 1.0
    fraction: float = 1.0

    @property
    def start(self) -> float:
        """The factor at the start of the run."""
        return 0.0 if self.name == "warmup" else 1.0

    @property
    def lowest(self) -> float:
        """The smallest factor of the run."""
        return min(self.start, self.end)

    @property
    def highest(self) -> float:
        """The largest factor of the run."""
        return max(1.0, self.end)


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("END",),
    "cosine": ("END",),
    "exponential": ("END",),
    "step": ("FRACTION", "VALUE"),
    "warmup": ("FRACTION",),
}
"""The arguments of each schedule; the functions are in `moejax.training.schedules.SCHEDULES`."""


LARGEST_FACTOR = 1e6


def parse_schedule(key: str, text: str) -> Schedule:
    """Returns the schedule that a leaf names.

    Raises:
      ConfigError: an unknown name, a wrong number of arguments, or one out of range.
    """
    name, *texts = text.split(":")
    if name not in ARGUMENTS:
        raise ConfigError(
            f"{key}={format_value(text)!r} must name one of the schedules "
            f"{', '.join(ARGUMENTS)}; the nearest is {nearest(name, ARGUMENTS)}"
        )
    try:
        values = [float(value) for value in texts]
        arguments = dict(zip(ARGUMENTS[name], values, strict=True))
    except ValueError as error:
        form = ":".join([name, *ARGUMENTS[name]])
        raise ConfigError(f"{key}={text!r} must have the form {form}, with numbers") from error
    fraction = arguments.get("FRACTION", 1.0)
    end = arguments.get("END", arguments.get("VALUE", 1.0))
    require(0 < fraction <= 1, f"{key}={text!r} must have a FRACTION above 0 and at most 1")
    # An exponential schedule takes the logarithm of its end.
    lowest = 1e-6 if name == "exponential" else 0.0
    require(
        lowest <= end <= LARGEST_FACTOR,
        f"{key}={text!r}: the factor must be between {lowest:g} and 1e6",
    )
    return Schedule(name, end, fraction)


def validate_schedules(
    schedules: ScheduleConfig, moe: MoeConfig, kinds: Iterable[MoeConfig | None]
) -> None:
    """Raises `ConfigError` for a schedule that cannot be read or does not go with what it scales.

    Args:
      schedules: the section.
      moe: the experts of the model.
      kinds: those of each layer; None where it is dense.
    """
    for name, text in dataclasses.asdict(schedules).items():
        schedule = parse_schedule(f"schedule.{name}", text)
        if schedule.name != "constant":
            _validate_factor(name, text, schedule, moe)
    if schedules.top_k == "constant":
        return
    for kind in kinds:
        if kind is not None:
            _validate_top_k(schedules.top_k, kind)


def _validate_factor(name: str, text: str, schedule: Schedule, moe: MoeConfig) -> None:
    """Raises `ConfigError` for a factor that takes a leaf out of the values it can have."""
    value = getattr(moe, name)
    largest = value * schedule.highest
    sizes_arrays = name in ("capacity_factor", "top_k")
    is_fraction = name in ("jitter", "expert_dropout")
    require(
        not sizes_arrays or schedule.highest <= 1,
        f"schedule.{name}={text!r} must not exceed 1: arrays have the size that "
        f"moe.{name}={value} needs",
    )
    require(
        not is_fraction or largest < 1,
        f"schedule.{name}={text!r} takes moe.{name}={value} to {largest:g}; it must stay below 1",
    )
    if name == "noise_scale" and schedule.lowest == 0:
        _refuse_losses_that_divide(text, moe)


def _refuse_losses_that_divide(text: str, moe: MoeConfig) -> None:
    """Raises `ConfigError` for a loss that divides by noise that falls to 0."""
    for loss, spec in moe.weighted_losses.items():
        weight = getattr(moe, f"{loss}_weight")
        require(
            not spec.divides_by_noise,
            f"schedule.noise_scale={text!r} falls to 0, and moe.{loss}_weight={weight} divides "
            f"by the noise; let it end above 0, or set moe.{loss}_weight=0",
        )


def _validate_top_k(text: str, kind: MoeConfig) -> None:
    """Raises `ConfigError` where a layer cannot do with fewer experts per token."""
    require(
        ROUTER_RULES[kind.router].can_limit,
        f"schedule.top_k={text!r} does not go with moe.router={kind.router}, whose weights need a "
        "fixed moe.top_k; leave it constant",
    )
    for loss, spec in kind.weighted_losses.items():
        weight = getattr(kind, f"{loss}_weight")
        require(
            not spec.estimates_load,
            f"schedule.top_k={text!r} does not go with moe.{loss}_weight={weight}, whose estimate "
            f"needs a fixed moe.top_k; leave it constant, or set moe.{loss}_weight=0",
        )
    lowest = parse_schedule("schedule.top_k", text).lowest
    falls_to_one = active_top_k_of(kind.top_k, lowest) <= 1
    makes_weights_one = kind.renormalize and kind.score != "uniform"
    require(
        not (falls_to_one and makes_weights_one),
        f"schedule.top_k={text!r} falls to 1 expert, where moe.renormalize=True makes every "
        "weight 1 and the task gradient of the router 0; set moe.renormalize=False",
    )


def active_top_k_of(top_k: int, factor: float) -> int:
    """Returns the experts per token at a factor on `moe.top_k`, at least 1."""
    return max(1, math.floor(top_k * factor + 0.5))
