"""All leaves by their dotted keys."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.errors import ConfigError, nearest
from moejax.config.schema.leaf import Leaf, leaf_of, parse_value
from moejax.config.schema.needs import Scaled
from moejax.config.sections.root import SECTIONS, Config


@dataclasses.dataclass(frozen=True)
class Declared:
    """A leaf.

    Attributes:
      section: that it is in.
      name: there.
      annotation: its type.
      default: its value where none is given.
      leaf: its meaning, its range, and what it needs.
    """

    section: str
    name: str
    annotation: Any
    default: Any
    leaf: Leaf

    @property
    def key(self) -> str:
        """Section and name."""
        return f"{self.section}.{self.name}"

    @property
    def needs_text(self) -> str:
        """What it needs, in words; "" where something always reads it."""
        need = self.leaf.needs
        if not isinstance(need, Scaled):
            return need.text if need else ""
        scaled = declared()[need.key].leaf.needs
        return f"{need.text} ({scaled.text})" if scaled else need.text

    def value(self, config: Config) -> Any:
        """Its value."""
        return getattr(getattr(config, self.section), self.name)


@functools.cache
def declared() -> Mapping[str, Declared]:
    """Every leaf by its dotted key, in the order of the sections; read once: a sweep resolves many configurations."""
    found = {}
    for section, make in SECTIONS.items():
        hints = typing.get_type_hints(make)
        for field in dataclasses.fields(make):
            each = Declared(section, field.name, hints[field.name], field.default, leaf_of(field))
            found[each.key] = each
    return types.MappingProxyType(found)


def leaves() -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, annotated type) of every leaf."""
    for key, each in declared().items():
        yield key, each.annotation


def check_key(key: str) -> None:
    """Raises `ConfigError` naming the nearest key if `key` (dotted, without `config.`) is no leaf."""
    if key not in declared():
        raise ConfigError(f"{key} is not a config key; the nearest is {nearest(key, declared())}")


def read_value(key: str, text: str) -> Any:
    """The value of a leaf, as the command line writes it.

    Raises:
      ConfigError: no such leaf, or text that is no value of its type.
    """
    check_key(key)
    return parse_value(key, text, declared()[key].leaf, declared()[key].annotation)
