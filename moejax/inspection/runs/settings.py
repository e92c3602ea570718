"""The leaves of a run's configuration compared with their defaults: which of them were chosen."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from moejax.config import Config, ConfigError, resolve_recorded, to_dict

Sections: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Leaves of a configuration by section."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A leaf of a run's configuration.

    Attributes:
      section: of the leaf.
      name: in its section.
      value: of the run, as resolved.
      default: what it is if it is not set; None if this version has no such leaf.
      is_chosen: whether the value is neither the default nor what follows from the other leaves.
    """

    section: str
    name: str
    value: Any
    default: Any
    is_chosen: bool


def settings_of(config: Sections) -> list[Setting]:
    """Returns the leaves of a configuration in their order.

    Args:
      config: sections of leaves, resolved: a leaf such as `moe.d_expert`, which its default lets
        follow from others, holds what followed from them, and does not count as chosen.
    """
    defaults = to_dict(Config())
    settings = []
    for section, leaves in config.items():
        section_defaults = defaults.get(section, {})
        for name, value in leaves.items():
            default = section_defaults.get(name)
            is_chosen = value != default and not _follows(config, section, name)
            settings.append(Setting(section, name, value, default, is_chosen))
    return settings


def _follows(config: Sections, section: str, name: str) -> bool:
    """Whether a leaf gets its value from the others when it is left at its default."""
    others = dict(config[section])
    value = others.pop(name)
    with_default = {**config, section: others}
    try:
        resolved = to_dict(resolve_recorded(with_default))
    except (ConfigError, TypeError, ArithmeticError):
        return False
    leaves = resolved.get(section, {})
    return bool(leaves.get(name) == value)
