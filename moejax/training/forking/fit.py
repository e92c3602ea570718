"""Which array of a source becomes which array of a fork."""

import dataclasses
from collections.abc import Mapping, Sequence

from moejax.config import ConfigError, InitConfig, is_named, read_names, read_renames

OF_THE_RUN = ("idle_steps", "active_top_k")
"""State of routers that says how far a run is, and belongs to no weights."""

OF_EXPERTS = ("experts", "router")
"""Axes along which there is one part for each expert."""

SHOWN = 3
"""Arrays that a message names."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Array:
    """What is known of an array of a model.

    Attributes:
      shape: its sizes.
      axes: its logical axes.
    """

    shape: Shape
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What becomes of each array of a fork.

    Attributes:
      taken: the path in the source, by the path here. Where the shapes differ, experts are copied.
      initialised: paths of arrays that keep their initial values.
    """

    taken: Mapping[str, str]
    initialised: tuple[str, ...]


def fit_arrays(source: Mapping[str, Array], here: Mapping[str, Array], init: InitConfig) -> Fit:
    """Finds the source of every array.

    Paths begin with `params/` or `router_state/`.

    Args:
      source: arrays of the source, by path.
      here: arrays of the fork.
      init: what is taken, renamed and resized.

    Raises:
      ConfigError: an array of the fork that the source lacks or has in another shape, or one of
        the source that the fork has no place for, unless the section `init` says what becomes of
        it; or a name in it that no array has.
    """
    include = read_names("init.include", init.include) or ("*",)
    exclude = read_names("init.exclude", init.exclude)
    renamed: dict[str, str] = {}
    for path in source:
        own = _rename(path, init)
        if own in renamed:
            raise ConfigError(
                f"init.rename={init.rename} gives {renamed[own]} and {path} of the source one "
                "place; give the other another place, too"
            )
        renamed[own] = path
    taken: dict[str, str] = {}
    initialised: list[str] = []
    absent: list[str] = []
    for path, array in here.items():
        if not _is_taken(path, include, exclude):
            initialised.append(path)
        elif path not in renamed:
            absent.append(path)
        elif _fits(source[renamed[path]], array, path, init):
            taken[path] = renamed[path]
        else:
            initialised.append(path)
    unused = []
    for path in renamed:
        if path not in here and _is_taken(path, include, exclude):
            unused.append(path)
    _refuse(absent, unused, init)
    _check_used("init.include", read_names("init.include", init.include), [*here, *renamed])
    _check_used("init.exclude", exclude, [*here, *renamed])
    return Fit(taken, tuple(initialised))


def _rename(path: str, init: InitConfig) -> str:
    field, _, own = path.partition("/")
    for before, after in read_renames(init.rename).items():
        if own.startswith(before):
            return f"{field}/{after}{own.removeprefix(before)}"
    return path


def _is_taken(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    _, _, own = path.partition("/")
    if own.rpartition("/")[2] in OF_THE_RUN:
        return False
    is_included = any(is_named(own, name) for name in include)
    return is_included and not any(is_named(own, name) for name in exclude)


def _fits(source: Array, here: Array, path: str, init: InitConfig) -> bool:
    """Whether an array can be taken; False where it is to be initialised for its shape."""
    if source.shape == here.shape:
        return True
    if init.resize == "fresh":
        return False
    if init.resize == "copy":
        grown = _grown_axes(source, here)
        if grown is not None and all(axis in OF_EXPERTS for axis in grown):
            return True
    remedy = "init.resize=copy takes more experts as copies, init.resize=fresh initialises it"
    if init.resize == "copy":
        remedy = "copies make more experts alone; use init.exclude, or init.resize=fresh"
    raise ConfigError(
        f"{path} is {_sizes(source)} in init.source={init.source} and {_sizes(here)} in this "
        f"model; {remedy}"
    )


def _grown_axes(source: Array, here: Array) -> list[str | None] | None:
    """Returns the axes that are larger here; None for arrays of other axes, or if one is smaller.

    Fewer experts would lose some without a word.
    """
    if source.axes != here.axes or len(source.shape) != len(here.shape):
        return None
    sizes = list(zip(here.axes, source.shape, here.shape, strict=True))
    if any(before > after for _, before, after in sizes):
        return None
    return [axis for axis, before, after in sizes if before != after]


def _sizes(array: Array) -> str:
    return "x".join(map(str, array.shape)) or "a number"


def _refuse(absent: Sequence[str], unused: Sequence[str], init: InitConfig) -> None:
    if absent:
        raise ConfigError(
            f"init.source={init.source} has no {_listed(absent)}; initialise what it lacks by "
            "init.exclude, or name its place by init.rename"
        )
    if unused:
        raise ConfigError(
            f"this model has no place for {_listed(unused)} of init.source={init.source}; leave "
            "it out by init.exclude, or name its place by init.rename"
        )


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(path.partition("/")[2] for path in paths[:SHOWN])
    num_more = len(paths) - SHOWN
    return f"{shown} and {num_more} more" if num_more > 0 else shown


def _check_used(key: str, names: Sequence[str], paths: Sequence[str]) -> None:
    own = [path.partition("/")[2] for path in paths]
    for name in names:
        if not any(is_named(path, name) for path in own):
            raise ConfigError(
                f"{key}: neither the source nor this model has a parameter {name}; leave it out"
            )
