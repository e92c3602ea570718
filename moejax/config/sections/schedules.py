"""How knobs change over training: one leaf per knob, which names a schedule of the factor on its value."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from moejax.config.errors import ConfigError, format_value, nearest, require
from moejax.config.router_rules import ROUTER_RULES
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import Scaled
from moejax.config.sections.moe import MoeConfig


def _of(key: str) -> Any:
    return leaf("constant", f"schedule of the factor on {key}", needs=Scaled(key))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Schedules of factors; each leaf has the name of the leaf of `moe` that it scales.

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
    balance_weight: str = _of("moe.balance_weight")
    sequence_balance_weight: str = _of("moe.sequence_balance_weight")
    importance_weight: str = _of("moe.importance_weight")
    vmoe_importance_weight: str = _of("moe.vmoe_importance_weight")
    load_weight: str = _of("moe.load_weight")
    vmoe_load_weight: str = _of("moe.vmoe_load_weight")
    z_weight: str = _of("moe.z_weight")


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


def parse_schedule(key: str, text: str) -> Schedule:
    """Reads the schedule that a leaf names.

    Raises:
      ConfigError: an unknown name, a wrong number of arguments, or one out of range.
    """
    name, *texts = text.split(":")
    if name not in ARGUMENTS:
        raise ConfigError(
            f"{key}={format_value(text)!r} must name one of the schedules {', '.join(ARGUMENTS)}; the nearest is "
            f"{nearest(name, ARGUMENTS)}"
        )
    form = ":".join([name, *ARGUMENTS[name]])
    try:
        arguments = dict(zip(ARGUMENTS[name], map(float, texts), strict=True))
    except ValueError as error:
        raise ConfigError(f"{key}={text!r} must have the form {form}, with numbers") from error
    fraction, end = (
        arguments.get("FRACTION", 1.0),
        arguments.get("END", arguments.get("VALUE", 1.0)),
    )
    require(0 < fraction <= 1, f"{key}={text!r} must have a FRACTION above 0 and at most 1")
    lowest = 1e-6 if name == "exponential" else 0.0
    require(lowest <= end <= 1e6, f"{key}={text!r}: the factor must be between {lowest:g} and 1e6")
    return Schedule(name, end, fraction)


def validate_schedules(
    schedules: ScheduleConfig, moe: MoeConfig, kinds: Iterable[MoeConfig | None]
) -> None:
    """Raises `ConfigError` for a schedule that cannot be read, or that does not go with what it scales.

    Args:
      schedules: the section.
      moe: the experts of the model.
      kinds: those of each layer; None where it is dense.
    """
    experts = [kind for kind in kinds if kind is not None]
    for name, text in dataclasses.asdict(schedules).items():
        schedule, value = parse_schedule(f"schedule.{name}", text), getattr(moe, name)
        if schedule.name == "constant":
            continue
        require(
            name not in ("capacity_factor", "top_k") or schedule.highest <= 1,
            f"schedule.{name}={text!r} must not exceed 1: arrays have the size that moe.{name}={value} needs",
        )
        require(
            name not in ("jitter", "expert_dropout") or value * schedule.highest < 1,
            f"schedule.{name}={text!r} takes moe.{name}={value} to {value * schedule.highest:g}; it must stay below 1",
        )
        require(
            name != "noise_scale" or moe.load_weight == 0 or schedule.lowest > 0,
            f"schedule.noise_scale={text!r} falls to 0, and moe.load_weight={moe.load_weight} divides by the noise",
        )
    if schedules.top_k == "constant":
        return
    lowest = parse_schedule("schedule.top_k", schedules.top_k).lowest
    for kind in experts:
        can_limit = ROUTER_RULES[kind.router].can_limit
        require(
            can_limit and kind.load_weight == kind.vmoe_load_weight == 0,
            f"schedule.top_k={schedules.top_k!r} does not go with moe.router={kind.router}, moe.load_weight="
            f"{kind.load_weight}, moe.vmoe_load_weight={kind.vmoe_load_weight}: their formulas need a fixed moe.top_k",
        )
        require(
            not kind.renormalize or kind.score == "uniform" or limit_of(kind.top_k, lowest) > 1,
            f"schedule.top_k={schedules.top_k!r} falls to 1 expert, where moe.renormalize=True makes every "
            "weight 1 and the task gradient of the router 0; set moe.renormalize=False",
        )


def limit_of(top_k: int, factor: float) -> int:
    """Experts per token at a factor on `moe.top_k`."""
    return max(1, math.floor(top_k * factor + 0.5))
