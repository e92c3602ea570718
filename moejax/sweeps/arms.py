"""The arms of a sweep: each point becomes a checked configuration before the first one trains."""

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

LISTED = 10
"""Bad points that an error names."""

MOST = 100_000
"""Points: each is resolved before the first arm trains, some thousands a second."""


Recipe = Mapping[str, Mapping[str, Any]]
"""Sections of leaves."""

Duplicate = tuple[dict[str, Any], str]
"""What a point overrides, and the id of the arm that has its configuration."""


class SweepError(ValueError):
    """A sweep that cannot be planned, or a plan that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration of a sweep.

    Attributes:
      id: the first digits of `config_hash`, which name its run directory.
      config_hash: of what the configuration sets, see `ids.hash_config`; of an arm that an earlier
        version recorded, what that version made of it.
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
        """Returns the arm of a resolved configuration."""
        digits = hash_config(config)
        return cls(
            id=digits[:ID_DIGITS],
            config_hash=digits,
            overrides=dict(overrides),
            matched=dict(matched),
            config=config,
            count=count(config),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the arm's entry in `sweep.json`."""
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
        """Returns the arm of an entry.

        Its id and hash are those of the entry, whatever leaves configurations have got since.

        Raises:
          SweepError: the entry is not that of an arm.
        """
        try:
            config = resolve_recorded(entry["config"])
            return cls(
                id=entry["id"],
                config_hash=entry["config_hash"],
                overrides=dict(entry["overrides"]),
                matched=dict(entry["matched"]),
                config=config,
                count=count(config),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SweepError(
                f"an arm in sweep.json is damaged ({error}); restore it, or plan the sweep again"
            ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """All arms of a sweep.

    Attributes:
      arms: in the order of the points, each configuration once; then the dense controls.
      duplicates: points that resolve to the configuration of an arm before them: overrides, and
        that arm's id.
      changes: what matching changed, a line for each setting, whatever its seeds.
    """

    arms: tuple[Arm, ...]
    duplicates: tuple[Duplicate, ...] = ()
    changes: tuple[str, ...] = ()


def plan_arms(
    base: Recipe,
    points: Iterable[Mapping[str, Any]],
    *,
    match: Match = "",
    adjust: Adjust = "width",
    dense_control: bool = True,
) -> Plan:
    """Applies every point to a recipe and checks the resulting configurations.

    Points without experts that differ only in leaves of experts are one configuration, that of
    their dense control.

    Args:
      base: the recipe: sections of leaves.
      points: what arms override.
      match: what arms have in common with the recipe: active parameters, all parameters or FLOPs of
        training; "" for nothing.
      adjust: what is changed for it: the width of experts (of dense layers in a dense arm), or with
        match="flops" the number of steps.
      dense_control: whether matched arms get dense controls, one for each setting of the leaves
        that do not belong to experts.

    Raises:
      SweepError: no points, or more than 100,000; or points that cannot work, all of which are
        counted and the first ten named.
      MatchError: no such match, or parameters matched by steps.
      ConfigError: the recipe itself cannot work, and is matched with.
    """
    target = Target.from_recipe(resolve_recorded(base), match, adjust) if match else None
    listed = _list_points(points)
    planning = _Planning(base, target)
    errors = []
    for point in listed:
        try:
            planning.add(point)
        except (ConfigError, MatchError, SweepError) as error:
            errors.append(f"{describe(point)}: {error}")
    if errors:
        raise SweepError(_list_errors(errors, len(listed)))
    if target is not None and dense_control:
        for control in _dense_points(base, listed, adjust):
            _add_control(planning, control)
    return Plan(tuple(planning.arms.values()), tuple(planning.duplicates), tuple(planning.changes))


def _list_points(points: Iterable[Any]) -> list[Any]:
    """Returns all points; a space that knows its size is refused before it is iterated."""
    size = points.size if isinstance(points, Space) else None
    if size is not None and size > MOST:
        raise _too_many_points(f"{size:,}")
    listed = [*itertools.islice(points, MOST + 1)]
    if not listed:
        raise SweepError("the sweep has no points; give axes, or a sweep() that yields some")
    if len(listed) > MOST:
        raise _too_many_points(f"more than {MOST:,}")
    return listed


def _too_many_points(number: str) -> SweepError:
    return SweepError(
        f"the sweep has {number} points and may have {MOST:,}; "
        "give its axes fewer values, or let a search draw from them (--search=random)"
    )


def describe(overrides: Any) -> str:
    """Returns overrides as one writes them: `moe.num_experts=16 moe.top_k=4`."""
    if not isinstance(overrides, Mapping):
        return repr(overrides)
    return " ".join(f"{key}={value}" for key, value in overrides.items()) or "the recipe itself"


def check_same(first: Arm, second: Arm) -> None:
    """Raises `SweepError` if two arms of one id have different configurations.

    One of the two would be lost.
    """
    if hash_config(first.config) != hash_config(second.config):
        raise SweepError(
            f"the id {second.id} is that of two configurations, "
            f"{describe(first.overrides)} and {describe(second.overrides)}; "
            "give one of them another train.seed, or a sweep of its own"
        )


class _Planning:
    """Collects the arms of a plan, one point after another."""

    def __init__(self, base: Recipe, target: Target | None):
        self.base = base
        self.target = target
        self.arms: dict[str, Arm] = {}
        self.duplicates: list[Duplicate] = []
        self.changes: dict[str, None] = {}  # a set in order

    def add(self, point: Any, is_control: bool = False) -> None:
        """Adds the arm of a point, or notes the point as a duplicate of an arm that is there."""
        _check_point(point)
        config, settings = self._resolve(point)
        _refuse_dead_axes(config, settings)
        config, change = self._match(config, point, settings)
        _check_mesh(config)
        matched = {change.leaf: change.value} if change else {}
        arm = Arm.from_config(config, point, matched)
        if arm.id in self.arms:
            check_same(self.arms[arm.id], arm)
            if not is_control:
                self.duplicates.append((dict(point), arm.id))
            return
        self.arms[arm.id] = arm
        if change:
            setting = {key: value for key, value in point.items() if key != "train.seed"}
            self.changes[f"{describe(setting)}: {change.change}"] = None

    def _resolve(self, point: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
        """Returns the configuration of a point, and what is set in the recipe for it.

        What a point without experts sets of experts is left out.
        """
        settings = dict(point)
        config = self._with(settings)
        if not config.moe.num_experts:
            settings = _without_experts(self.base, point)
            config = self._with(settings)
        return config, settings

    def _with(self, settings: Mapping[str, Any]) -> Config:
        """Returns the recipe's configuration with some leaves set."""
        recipe = _apply_point(self.base, settings)
        return resolve_recorded(recipe)

    def _match(
        self, config: Config, point: Mapping[str, Any], settings: dict[str, Any]
    ) -> tuple[Config, Matched | None]:
        """Returns the configuration after matching, and what matching changed; None for nothing."""
        if self.target is None:
            return config, None
        found = self.target.match_arm(config, point)
        if not found.is_changed:
            return config, None
        changed = settings | {found.leaf: found.value}
        return self._with(changed), found


def _add_control(planning: _Planning, control: dict[str, Any]) -> None:
    try:
        planning.add(control, is_control=True)
    except (ConfigError, MatchError, SweepError) as error:
        raise SweepError(
            f"the dense control {describe(control)}: {error}; or plan without it"
        ) from error


def _check_point(point: Any) -> None:
    """Raises `SweepError` or `ConfigError` unless a point is a dict whose keys are leaves."""
    if not isinstance(point, Mapping):
        raise SweepError(
            "is no point; give a dict of config keys and values, such as {'moe.top_k': 1}"
        )
    for key in point:
        check_key(str(key))


def _check_mesh(config: Config) -> None:
    """Raises `ConfigError` if what the mesh splits is no multiple of its sizes.

    A size of -1 depends on the number of devices, which the plan does not know: it counts as 1.
    """
    sizes = dataclasses.asdict(config.mesh)
    known_sizes = {axis: max(1, size) for axis, size in sizes.items()}
    check_divisible(config, dataclasses.replace(config.mesh, **known_sizes))


def _refuse_dead_axes(config: Config, settings: Mapping[str, Any]) -> None:
    """Raises `SweepError` for a leaf that a point sets and its arm does not read.

    Such an axis would train an arm twice. Leaves of the recipe may be for other arms;
    `config.resolve` checks them, with what varies.
    """
    try:
        refuse_unread(config, keys=settings, typed=settings)
    except UnreadError as error:
        raise SweepError(
            f"{error}; or leave such points out by where(space, predicate) in the recipe's sweep()"
        ) from error


def _apply_point(base: Recipe, point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sections of a recipe with a point's values in them."""
    applied: dict[str, dict[str, Any]] = {}
    for section, leaves in base.items():
        applied[section] = dict(leaves)
    for key, value in point.items():
        section, _, name = key.partition(".")
        own_leaves = applied.setdefault(section, {})
        own_leaves[name] = value
    return applied


def _dense_points(
    base: Recipe, points: Iterable[Mapping[str, Any]], adjust: Adjust
) -> list[dict[str, Any]]:
    """Returns one dense control for each setting of the leaves that do not belong to experts.

    The width that matching adjusts is left out, too.
    """
    adjusted = "model.d_ff" if adjust == "width" else ""
    controls = []
    for point in points:
        kept = dict(point)
        kept.pop(adjusted, None)
        control = _without_experts(base, kept)
        controls.append(tuple(sorted(control.items())))
    different = dict.fromkeys(controls)
    return [dict(control) for control in different]


def _without_experts(base: Recipe, point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the point of the dense model that goes with a point.

    What the point sets of experts is left out, and what the recipe sets that needs experts is
    switched off: layers that differ, and schedules of the experts' knobs.
    """
    dense = {
        key: value for key, value in point.items() if not key.startswith(("moe.", "schedule."))
    }
    dense["moe.num_experts"] = 0
    if base.get("moe", {}).get("per_layer", "") != "":
        dense["moe.per_layer"] = ""
    for name, schedule in base.get("schedule", {}).items():
        if schedule != "constant":
            dense[f"schedule.{name}"] = "constant"
    return dense


def _list_errors(errors: list[str], num_points: int) -> str:
    num_errors = len(errors)
    lines = [f"{num_errors} of {num_points} points cannot work, so none is run:"]
    for number, error in enumerate(errors[:LISTED], start=1):
        lines.append(f"{number}. {error}")
    if num_errors > LISTED:
        lines.append(f"and {num_errors - LISTED} more")
    return "\n  ".join(lines)
