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
    """A leaf as a section declares it.

    Attributes:
      section: name of the section.
      name: name of the leaf within it.
      annotation: its type.
      default: its value if none is given.
      leaf: its meaning, its range, and what it needs.
    """

    section: str
    name: str
    annotation: Any
    default: Any
    leaf: Leaf

    @property
    def key(self) -> str:
        """Section and name, with a dot between them."""
        return f"{self.section}.{self.name}"

    @property
    def needs_text(self) -> str:
        """What it needs, in words; "" if something always reads it."""
        need = self.leaf.needs
        if need is None:
            return ""
        # A schedule is read if the leaf that it scales is, so it also shows what that one needs.
        scaled = declared()[need.key].leaf.needs if isinstance(need, Scaled) else None
        return need.text if scaled is None else f"{need.text} ({scaled.text})"

    def value(self, config: Config) -> Any:
        """Returns its value in a configuration."""
        section = getattr(config, self.section)
        return getattr(section, self.name)


@functools.cache
def declared() -> Mapping[str, Declared]:
    """Returns every leaf by its dotted key, in the order of the sections.

    The types are read once, because a sweep resolves many configurations.
    """
    found = {}
    for section, section_class in SECTIONS.items():
        hints = typing.get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            each = Declared(
                section=section,
                name=field.name,
                annotation=hints[field.name],
                default=field.default,
                leaf=leaf_of(field),
            )
            found[each.key] = each
    return types.MappingProxyType(found)


def leaves() -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, annotated type) of every leaf."""
    for key, each in declared().items():
        yield key, each.annotation


def check_key(key: str) -> None:
    """Raises `ConfigError`, which names the nearest key, unless `key` is a leaf: "moe.top_k"."""
    if key in declared():
        return
    _, _, name = key.partition(".")
    of_that_name = [other for other, each in declared().items() if each.name == name]
    meant = of_that_name[0] if of_that_name else nearest(key, declared())
    raise ConfigError(f"{key} is not a config key; the nearest is {meant}")


def read_value(key: str, text: str) -> Any:
    """Returns the value of a leaf from text, as the command line has it.

    Raises:
      ConfigError: no such leaf, or text that is no value of its type.
    """
    check_key(key)
    each = declared()[key]
    return parse_value(key, text, each.leaf, each.annotation)
