"""Groups of parameters that are trained in another way than the rest: `optimizer.groups`.

    router: rate=0.3 weight_decay=0; experts: clip_norm=0.5; *norm/scale: rate=2

An entry names a kind of parameters, or is a pattern of their paths. The first entry that fits a
parameter is its group.
"""

import dataclasses
import fnmatch
import types
from collections.abc import Mapping

from moejax.config.errors import ConfigError, format_value, nearest, require
from moejax.config.schema.leaf import LARGEST_FLOAT

KINDS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "embedding": ("embedding", "unembedding", "logits_bias"),
        "norm": ("*norm/scale", "*norm/bias"),
        "router": ("*/router/*",),
        "shared": ("*/shared/*",),
        "experts": ("*/experts/*",),
        "attention": ("*/mixer/*",),
        "dense": ("*/ffn/gate_up*", "*/ffn/down*"),
    }
)
"""Kinds of parameters, and the patterns of their paths; the first that fits counts."""

CHANGES = ("rate", "weight_decay", "clip_norm")


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained in another way.

    Attributes:
      name: of a kind, or a pattern of paths.
      rate: factor of the learning rate.
      weight_decay: of those that decay; None is that of the rest.
      clip_norm: largest norm of the gradient of all of them together; 0 is none of their own.
    """

    name: str
    rate: float = 1.0
    weight_decay: float | None = None
    clip_norm: float = 0.0

    def has(self, path: str) -> bool:
        """Whether a parameter is in the group, unless one before it has it."""
        return is_named(path, self.name)


def is_named(path: str, name: str) -> bool:
    """Whether a parameter is of a kind, or fits a pattern of paths.

    Args:
      path: of the parameter, such as `stacks/0/block/ffn/router/kernel`.
      name: one of `KINDS`, or a pattern such as `*/router/*`.
    """
    if name in KINDS:
        return kind_of(path) == name
    return fnmatch.fnmatchcase(path, name)


def kind_of(path: str) -> str:
    """Returns the kind of a parameter, one of `KINDS`; "other" if it is none of them.

    Args:
      path: of the parameter, such as `stacks/0/block/ffn/router/kernel`.
    """
    for kind, patterns in KINDS.items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return kind
    return "other"


def read_groups(text: str) -> tuple[ParameterGroup, ...]:
    """Returns the groups of `optimizer.groups`, in order.

    Raises:
      ConfigError: an entry that cannot be read.
    """
    groups: list[ParameterGroup] = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        name, colon, changes = entry.partition(":")
        name = name.strip()
        require(
            bool(colon and name),
            f"optimizer.groups: {format_value(entry)!r} must have the form NAME: CHANGES, such as "
            "router: rate=0.3",
        )
        check_name("optimizer.groups", name)
        require(
            name not in [group.name for group in groups],
            f"optimizer.groups names {name} twice; join both entries",
        )
        groups.append(ParameterGroup(name, **_read_changes(entry, changes)))
    return tuple(groups)


def read_names(key: str, text: str) -> tuple[str, ...]:
    """Returns kinds and patterns from a list such as "router, stacks/0/*".

    Raises:
      ConfigError: an entry that is neither a kind nor a pattern, or is there twice.
    """
    names: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        check_name(key, name)
        require(name not in names, f"{key} names {name} twice; leave one out")
        names.append(name)
    return tuple(names)


def check_name(key: str, name: str) -> None:
    """Raises `ConfigError` unless a name is a kind of parameters or a pattern of paths."""
    is_pattern = any(character in name for character in "*?[/")
    if name not in KINDS and not is_pattern:
        raise ConfigError(
            f"{key}: {format_value(name)!r} is no kind of parameters; the nearest is "
            f"{nearest(name, KINDS)}, and a pattern of paths has a * or a /"
        )


def _read_changes(entry: str, text: str) -> dict[str, float]:
    """Returns the changes of an entry from "rate=0.3 weight_decay=0"."""
    changes: dict[str, float] = {}
    for change in text.split():
        name, _, written = change.partition("=")
        if name not in CHANGES:
            raise ConfigError(
                f"optimizer.groups: {format_value(name)!r} is none of {', '.join(CHANGES)}; the "
                f"nearest is {nearest(name, CHANGES)}"
            )
        require(
            name not in changes,
            f"optimizer.groups: {format_value(entry)!r} sets {name} twice; leave one out",
        )
        changes[name] = _read_number(name, written)
    require(
        bool(changes),
        f"optimizer.groups: {format_value(entry)!r} changes nothing; write one of "
        f"{', '.join(CHANGES)}, such as rate=0.3",
    )
    return changes


def _read_number(name: str, written: str) -> float:
    try:
        number = float(written)
    except ValueError as error:
        raise ConfigError(
            f"optimizer.groups: {name}={format_value(written)} must be a number"
        ) from error
    require(
        0 <= number <= LARGEST_FLOAT,
        f"optimizer.groups: {name}={format_value(written)} must be at least 0; use 0 or more",
    )
    return number
