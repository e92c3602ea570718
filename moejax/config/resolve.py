"""From a recipe's `ConfigDict` to a checked `Config`, and back."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from moejax.config.errors import ConfigError
from moejax.config.moe import derive_moe
from moejax.config.schema import SECTIONS, Config
from moejax.config.validation import validate


def default() -> ConfigDict:
    """Every leaf with its default value, locked: what recipes in `configs/` start from."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ConfigDict:
    """The same leaves as a locked `ConfigDict`."""
    return ConfigDict(to_dict(config)).lock()


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The same leaves as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def leaves() -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, annotated type) of every leaf."""
    for section, make in SECTIONS.items():
        for name, annotation in _annotations(make).items():
            yield f"{section}.{name}", annotation


@functools.cache
def _annotations(section: type) -> Mapping[str, Any]:
    """Types of a section's leaves, read once: a sweep resolves hundreds of configurations."""
    return types.MappingProxyType(typing.get_type_hints(section))


def check_key(key: str) -> None:
    """Raises `ConfigError` naming the nearest key if `key` (dotted, without `config.`) is no leaf."""
    section, _, name = key.partition(".")
    if section not in SECTIONS or name not in _annotations(SECTIONS[section]):
        known = [name for name, _ in leaves()]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key} is not a config key; the nearest is {near}")


def resolve(source: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` or nested mapping into a checked `Config`.

    Args:
      source: sections of leaves; sections and leaves that are absent take their defaults.

    Returns:
      A `Config` with derived leaves filled in (`moe.d_expert`, `moe.score`).

    Raises:
      ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    values = source.to_dict() if isinstance(source, ConfigDict) else source
    for name in values:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{name} is not a config section; the nearest is {near}")
    sections = {}
    for section, make in SECTIONS.items():
        given, hints = values.get(section, {}), _annotations(make)
        if not isinstance(given, Mapping):
            raise ConfigError(f"{section}={given!r} is no section of leaves; set leaves such as {_first_leaf(section)}")
        for name in given:
            check_key(f"{section}.{name}")
        sections[section] = make(
            **{name: _checked(f"{section}.{name}", value, hints[name]) for name, value in given.items()}
        )
    config = _derive(Config(**sections))
    validate(config)
    return config


def _first_leaf(section: str) -> str:
    return next(key for key, _ in leaves() if key.startswith(f"{section}."))


def _checked(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, or a `ConfigError`."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(choices)}; the nearest is {near}")
        return value
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}={value!r} is {type(value).__name__}; it must be {annotation.__name__}")
    return value


def _derive(config: Config) -> Config:
    moe = config.moe
    if moe.num_experts and moe.d_expert == 0 and 0 < moe.top_k <= moe.num_choices:
        if config.model.d_ff % moe.top_k:
            raise ConfigError(
                f"model.d_ff={config.model.d_ff} is not a multiple of moe.top_k={moe.top_k}, so moe.d_expert cannot be "
                "derived; set moe.d_expert"
            )
        moe = dataclasses.replace(moe, d_expert=config.model.d_ff // moe.top_k)
    return dataclasses.replace(config, moe=derive_moe(moe, config.data.seq_len))
