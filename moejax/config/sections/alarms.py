"""When routing is reported as going wrong.

Each leaf is the threshold of a rule of `training/health/alarms.py`.
"""

import dataclasses

from moejax.config.errors import ConfigError, format_value, nearest
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import value

RULES = ("collapse", "dead_experts", "balance_floor", "logits", "ties", "drops", "entropy")
"""The rules, named as in `alarms.stop`, in the log and in the report."""


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """Thresholds, each for one layer over one logging interval; 0 switches a rule off."""

    collapse: float = leaf(
        0.6, "MaxVio as a fraction of the largest possible, E / K - 1", at_least=0, at_most=1
    )
    dead_experts: int = leaf(500, "steps in which an expert receives no token", at_least=0)
    balance_floor: float = leaf(
        0.9,
        'balance loss below its floor of 1: scores "hacked" under a normaliser\'s epsilon',
        at_least=0,
        at_most=1,
    )
    logits: float = leaf(
        100.0,
        "largest magnitude of a router logit; not finite is an alarm unless the rule is off",
        at_least=0,
    )
    ties: float = leaf(
        0.01,
        "share of tokens whose K-th and next expert rank equal: bfloat16 logits give 0.04 to 0.07",
        at_least=0,
        at_most=1,
    )
    drops: float = leaf(
        0.3,
        "share of choices that find no slot",
        at_least=0,
        at_most=1,
        needs=value("moe.dispatch", "capacity"),
        may_be_unread=True,
    )
    entropy: float = leaf(
        0.02, "entropy of the router's distribution, as a fraction of ln E", at_least=0, at_most=1
    )
    stop: str = leaf("", "rules that save the run and end it, separated by commas")

    @property
    def stopping(self) -> tuple[str, ...]:
        """The rules in `stop`."""
        names = [name.strip() for name in self.stop.split(",")]
        return tuple(filter(None, names))


def validate_alarms(alarms: AlarmConfig) -> None:
    """Raises `ConfigError` for rules in `alarms.stop` that do not exist, or are off."""
    for name in alarms.stopping:
        if name not in RULES:
            raise ConfigError(
                f"alarms.stop={format_value(alarms.stop)!r} names {format_value(name)!r}; "
                f"use some of {', '.join(RULES)}; the nearest is {nearest(name, RULES)}"
            )
        if not getattr(alarms, name):
            raise ConfigError(
                f"alarms.stop={alarms.stop!r} names {name}, which alarms.{name}=0 switches off"
            )
