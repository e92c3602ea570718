"""The points of `moejax sweep`: those of the recipe's `sweep()`, times axes, times seeds."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import recipe_text
from moejax.cli.recipe import explained, own_function, split_recipe
from moejax.sweeps import Space, parse_axis, product, seeds


def read_space(values: FlagValues, axes: list[str]) -> Space:
    """Returns the points: of the recipe's `sweep()`, times the axes given, times the seeds.

    Args:
      values: parsed flags.
      axes: words of the command line, KEY=VALUES.

    Raises:
      UsageError: nothing varies, or something is given twice.
    """
    spaces = own_spaces(values, axes)
    if values.seeds is not None:
        if values.seeds < 1:
            raise UsageError(
                f"--seeds={values.seeds} must be at least 1: how many seeds each point gets"
            )
        spaces.append(seeds(values.seeds))
    if not spaces:
        raise UsageError(
            "nothing varies; give axes such as moe.num_experts=4,8,16, or --seeds, or a recipe "
            "with a sweep()"
        )
    check_unique(spaces)
    return product(*spaces)


def own_spaces(values: FlagValues, axes: list[str]) -> list[Any]:
    """Returns the space of the recipe's `sweep()`, if it has one, and the axes that are given."""
    return [*_own_space(values), *map(parse_axis, axes)]


def check_unique(spaces: list[Any]) -> None:
    """Raises `UsageError` for an axis that is given twice."""
    keys: list[str] = []
    for space in spaces:
        axes = space.axes if isinstance(space, Space) else None
        keys += [axis.key for axis in axes or ()]
    repeated = [key for key in keys if keys.count(key) > 1]
    if repeated:
        raise UsageError(
            f"{repeated[0]} is given twice; give it once: as an axis, by --seeds, or in the "
            "recipe's sweep()"
        )


def _own_space(values: FlagValues) -> list[Space | list[Any]]:
    """Returns what a recipe's `sweep()` gives; nothing if it has none."""
    recipe, argument = split_recipe(recipe_text(values))
    function = own_function(values, "sweep")
    if function is None:
        return []
    # Of FILE:ARG a sweep() without parameters gets nothing: ARG is then for `get_config` alone.
    takes_argument = bool(inspect.signature(function).parameters)
    arguments = [argument] if takes_argument and argument is not None else []
    with explained(recipe):
        points = function(*arguments)
        if isinstance(points, Iterable) and not isinstance(points, Space):
            points = [*points]  # a generator runs the recipe's code here
    if not isinstance(points, Space | list | None):
        raise UsageError(
            f"{recipe}: sweep() returns {points!r}; return a space, such as product(...), or yield "
            "points"
        )
    if points is None or points == []:
        raise UsageError(
            f"{recipe}: sweep() gives nothing; return a space, such as product(...), or yield "
            "points"
        )
    if isinstance(points, list):
        _check_points(recipe, points)
    return [points]


def _check_points(recipe: str, points: list[Any]) -> None:
    """Raises `UsageError` for a point that is no mapping of keys to values."""
    for point in points:
        if not isinstance(point, Mapping):
            raise UsageError(
                f"{recipe}: sweep() yields {point!r}, which is no point; yield dicts, as "
                "{'moe.top_k': 2}"
            )
