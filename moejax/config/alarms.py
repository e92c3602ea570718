"""When routing is reported as going wrong: a threshold for each rule of `training/alarms.py`."""

import dataclasses

from moejax.config.errors import ConfigError

RULES = ("collapse", "dead_experts", "balance_floor", "logits", "ties", "drops", "entropy")
"""The rules, named as in `alarms.stop`, in the log and in the report."""


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """Thresholds, each for one layer over one logging interval; 0 switches a rule off."""

    collapse: float = 0.6  # MaxVio over the largest possible, E / K - 1
    dead_experts: int = 500  # steps without a token
    balance_floor: float = 0.9  # balance loss below its floor of 1: scores "hacked" under a normaliser's epsilon
    logits: float = 100.0  # largest magnitude of a router logit; not finite is an alarm unless the rule is off
    ties: float = 0.01  # share of tokens whose K-th and next expert rank equal: bfloat16 logits give 0.04 to 0.07
    drops: float = 0.3  # share of choices that find no slot
    entropy: float = 0.02  # of the router's distribution, over ln E
    stop: str = ""  # rules that save the run and end it, separated by commas

    @property
    def stopping(self) -> tuple[str, ...]:
        """The rules in `stop`."""
        return tuple(name.strip() for name in self.stop.split(",") if name.strip())


def validate_alarms(alarms: AlarmConfig) -> None:
    """Raises `ConfigError` for thresholds out of their range, and for rules that do not exist."""
    for name in ("collapse", "balance_floor", "ties", "drops", "entropy"):
        if not 0 <= getattr(alarms, name) <= 1:
            raise ConfigError(f"alarms.{name}={getattr(alarms, name)} must be between 0 (off) and 1")
    for name in ("dead_experts", "logits"):
        if not 0 <= getattr(alarms, name) < float("inf"):
            raise ConfigError(f"alarms.{name}={getattr(alarms, name)} must be at least 0 (off) and finite")
    for name in alarms.stopping:
        if name not in RULES:
            raise ConfigError(f"alarms.stop={alarms.stop!r} names {name!r}; use some of {', '.join(RULES)}")
        if not getattr(alarms, name):
            raise ConfigError(f"alarms.stop={alarms.stop!r} names {name}, which alarms.{name}=0 switches off")
