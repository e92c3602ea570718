"""The leaves of a run's configuration compared with their defaults: which of them were chosen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import Config, ConfigError, resolve_recorded, to_dict


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


def settings_of(config: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """Returns the leaves of a configuration in their order.

    Args:
      config: sections of leaves, resolved: a leaf such as `moe.d_expert`, which its default lets
        follow from others, holds what followed from them, and does not count as chosen.
    """
    defaults = to_dict(Config())
    settings = []
    for section, leaves in config.items():
        for name, value in leaves.items():
            default = defaults.get(section, {}).get(name)
            is_chosen = value != default and not _follows(config, section, name, value)
            settings.append(Setting(section, name, value, default, is_chosen))
    return settings


def _follows(config: Mapping[str, Mapping[str, Any]], section: str, name: str, value: Any) -> bool:
    """Whether a leaf gets this value from the others when it is left at its default."""
    others = {key: leaf for key, leaf in config[section].items() if key != name}
    with_default = {**config, section: others}
    try:
        resolved = to_dict(resolve_recorded(with_default))
    except (ConfigError, TypeError, ArithmeticError):
        return False
    followed = resolved.get(section, {}).get(name)
    return bool(followed == value)
