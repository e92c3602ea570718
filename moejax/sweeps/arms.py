"""The arms of a sweep: every point becomes a checked configuration before the first of them runs."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from moejax.config import (
    Config,
    ConfigError,
    UnreadError,
    check_key,
    refuse_unread,
    resolve_recorded,
    to_dict,
)
from moejax.planning.count import Count, count
from moejax.sharding import check_divisible
from moejax.sweeps.ids import ID_DIGITS, hash_config
from moejax.sweeps.matching import Adjust, Match, Matched, MatchError, Target
from moejax.sweeps.space import Space

LISTED = 10  # bad points that an error names
MOST = 100_000  # points: each is resolved before the first arm trains, some thousands a second


class SweepError(ValueError):
    """A sweep that cannot be planned, or a plan that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration of a sweep.

    Attributes:
      id: the first digits of `config_hash`, which name its run directory.
      config_hash: of the resolved configuration, see `ids.hash_config`.
      overrides: what its point sets, by dotted key.
      matched: leaves that matching changed; empty without.
      config: resolved.
      count: its parameters and arithmetic.
    """

    id: str
    config_hash: str
    overrides: dict[str, Any]
    matched: dict[str, Any]
    config: Config
    count: Count

    @classmethod
    def from_config(
        cls, config: Config, overrides: Mapping[str, Any], matched: Mapping[str, Any]
    ) -> "Arm":
        """An arm of a resolved configuration."""
        digits = hash_config(config)
        return cls(
            digits[:ID_DIGITS], digits, dict(overrides), dict(matched), config, count(config)
        )

    def to_json(self) -> dict[str, Any]:
        """Its entry in `sweep.json`."""
        return {
            "id": self.id,
            "config_hash": self.config_hash,
            "overrides": self.overrides,
            "matched": self.matched,
            "config": to_dict(self.config),
            "params_total": self.count.total,
            "params_active": self.count.active,
            "flops_per_token": self.count.flops_per_token,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Arm":
        """The arm of an entry. Its id and hash stay, whatever leaves configurations have got since.

        Raises:
          SweepError: the entry is none of an arm.
        """
        try:
            config = resolve_recorded(entry["config"])
            names = entry["id"], entry["config_hash"]
            return cls(
                *names, dict(entry["overrides"]), dict(entry["matched"]), config, count(config)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SweepError(
                f"an arm in sweep.json is damaged ({error}); restore it, or plan the sweep anew"
            ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """All arms of a sweep.

    Attributes:
      arms: in the order of the points, each configuration once; dense controls behind them.
      duplicates: points that resolve to the configuration of an arm before them: overrides, and
        that arm's id.
      changes: what matching changed, a line for each setting, whatever its seeds.
    """

    arms: tuple[Arm, ...]
    duplicates: tuple[tuple[dict[str, Any], str], ...] = ()
    changes: tuple[str, ...] = ()


def plan_arms(
    base: Mapping[str, Mapping[str, Any]],
    points: Iterable[Mapping[str, Any]],
    *,
    match: Match = "",
    adjust: Adjust = "width",
    dense_control: bool = True,
) -> Plan:
    """Applies every point to a recipe and checks what comes out.

    Points without experts that differ in leaves of experts alone are one configuration, that of
    their dense control.

    Args:
      base: the recipe: sections of leaves.
      points: what arms override.
      match: what arms have in common with the recipe: active parameters, all parameters or FLOPs of
        training; "" for nothing.
      adjust: what is changed for it: the width of experts (of dense layers in a dense arm), or with
        match="flops" the number of steps.
      dense_control: whether matched arms get dense ones beside them, one for each setting of all
        that is no experts'.

    Raises:
      SweepError: no points, or more than 100,000; or points that cannot work, all of which are
        counted and the first ten named.
      MatchError: no such match, or parameters matched by steps.
      ConfigError: the recipe itself cannot work, and is matched with.
    """
    target = Target.from_recipe(resolve_recorded(base), match, adjust) if match else None
    points, errors = _listed(points), []
    planning = _Planning(base, target)
    for point in points:
        try:
            planning.add(point)
        except (ConfigError, MatchError, SweepError) as error:
            errors.append(f"{describe(point)}: {error}")
    if errors:
        raise SweepError(_list_errors(errors, len(points)))
    if target is not None and dense_control:
        for control in _dense_points(base, points, adjust):
            try:
                planning.add(control, is_control=True)
            except (ConfigError, MatchError, SweepError) as error:
                raise SweepError(
                    f"the dense control {describe(control)}: {error}; or plan without it"
                ) from error
    return Plan(tuple(planning.arms.values()), tuple(planning.duplicates), tuple(planning.changes))


def _listed(points: Iterable[Any]) -> list[Any]:
    """All points; those of a product are counted before they are gone through."""
    size = points.size if isinstance(points, Space) else None
    listed = [*itertools.islice(points, MOST + 1)] if size is None or size <= MOST else []
    if size == 0 or (size is None and not listed):
        raise SweepError("the sweep has no points; give axes, or a sweep() that yields some")
    if not listed or len(listed) > MOST:
        number = f"{size:,}" if size else f"more than {MOST:,}"
        raise SweepError(
            f"the sweep has {number} points and may have {MOST:,}; give its axes fewer values, or let a search draw "
            "from them (--search=random)"
        )
    return listed


def describe(overrides: Any) -> str:
    """Overrides as one writes them: `moe.num_experts=16 moe.top_k=4`."""
    if not isinstance(overrides, Mapping):
        return repr(overrides)
    return " ".join(f"{key}={value}" for key, value in overrides.items()) or "the recipe itself"


def check_same(first: Arm, second: Arm) -> None:
    """Raises `SweepError` if two arms of one id are two configurations, of which one would be lost."""
    if first.config_hash != second.config_hash:
        raise SweepError(
            f"the id {second.id} is that of two configurations, {describe(first.overrides)} and "
            f"{describe(second.overrides)}; give one of them another train.seed, or a sweep of its own"
        )


class _Planning:
    """Arms so far."""

    def __init__(self, base: Mapping[str, Mapping[str, Any]], target: Target | None):
        self.base, self.target = base, target
        self.arms: dict[str, Arm] = {}
        self.duplicates: list[tuple[dict[str, Any], str]] = []
        self.changes: dict[str, None] = {}  # a set in order

    def add(self, point: Any, is_control: bool = False) -> None:
        """Adds the arm of a point, or what it equals."""
        if not isinstance(point, Mapping):
            raise SweepError(
                "is no point; give a dict of config keys and values, such as {'moe.top_k': 1}"
            )
        for key in point:
            check_key(str(key))
        config, settings = resolve_recorded(_applied(self.base, point)), dict(point)
        if not config.moe.num_experts:
            settings = _without_experts(self.base, point)
            config = resolve_recorded(_applied(self.base, settings))
        _refuse_dead_axes(config, settings)
        matched: dict[str, Any] = {}
        found: Matched | None = None
        if self.target is not None:
            found = self.target.match_arm(config, point)
            if found.is_changed:
                matched = {found.leaf: found.value}
                config = resolve_recorded(_applied(self.base, settings | matched))
        sizes = {
            axis: max(1, size) for axis, size in dataclasses.asdict(config.mesh).items()
        }  # -1 is for the devices
        check_divisible(config, dataclasses.replace(config.mesh, **sizes))
        arm = Arm.from_config(config, point, matched)
        if arm.id in self.arms:
            check_same(self.arms[arm.id], arm)
            if not is_control:
                self.duplicates.append((dict(point), arm.id))
            return
        self.arms[arm.id] = arm
        if found is not None and found.is_changed:
            setting = {key: value for key, value in point.items() if key != "train.seed"}
            self.changes[f"{describe(setting)}: {found.change}"] = None


def _refuse_dead_axes(config: Config, settings: Mapping[str, Any]) -> None:
    """Raises `SweepError` for a leaf that a point sets and its arm does not read: it would train an arm twice.

    Leaves of the recipe may be for other arms; `config.resolve` looks at them, with what varies.
    """
    try:
        refuse_unread(config, keys=settings, typed=settings)
    except UnreadError as error:
        raise SweepError(
            f"{error}; or leave such points out by where(space, predicate) in the recipe's sweep()"
        ) from error


def _applied(
    base: Mapping[str, Mapping[str, Any]], point: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    values = {section: dict(of_section) for section, of_section in base.items()}
    for key, value in point.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    return values


def _dense_points(
    base: Mapping[str, Mapping[str, Any]], points: Iterable[Mapping[str, Any]], adjust: Adjust
) -> list[dict[str, Any]]:
    """One dense control for each setting of all that is no experts': neither theirs, nor the width that is adjusted."""
    adjusted = "model.d_ff" if adjust == "width" else ""
    controls = [
        _without_experts(base, {key: point[key] for key in point if key != adjusted})
        for point in points
    ]
    return [
        dict(control) for control in dict.fromkeys(tuple(sorted(each.items())) for each in controls)
    ]


def _without_experts(
    base: Mapping[str, Mapping[str, Any]], point: Mapping[str, Any]
) -> dict[str, Any]:
    """A point of a dense model: what it sets of experts is left out, and so is what the recipe sets that needs them.

    That is layers that differ, and schedules of the experts' knobs.
    """
    off = {
        "moe.per_layer": "",
        **{f"schedule.{name}": "constant" for name in base.get("schedule", {})},
    }
    dense: dict[str, Any] = {"moe.num_experts": 0}
    for key, value in off.items():
        section, _, name = key.partition(".")
        if base.get(section, {}).get(name, value) != value:
            dense[key] = value
    return {
        key: value for key, value in point.items() if not key.startswith(("moe.", "schedule."))
    } | dense


def _list_errors(errors: list[str], num_points: int) -> str:
    lines = [f"{number}. {error}" for number, error in enumerate(errors[:LISTED], start=1)]
    more = [f"and {len(errors) - LISTED} more"] if len(errors) > LISTED else []
    return "\n  ".join(
        [f"{len(errors)} of {num_points} points cannot work, so none is run:", *lines, *more]
    )
