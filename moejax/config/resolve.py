"""From a recipe's `ConfigDict` to a checked `Config`, and back."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from moejax.config.errors import ConfigError, format_value, nearest
from moejax.config.layer_pattern import UNDERIVED
from moejax.config.schema.leaf import check_value
from moejax.config.schema.tree import check_key, declared
from moejax.config.schema.unread import refuse_unread
from moejax.config.sections.moe import derive_moe
from moejax.config.sections.root import SECTIONS, Config
from moejax.config.validation import validate

LEFT_OPEN: dict[str, Any] = {**UNDERIVED, "d_expert": 0}
"""Leaves of `moe` that are derived if they have these values, which are their defaults."""

MOVED = ("num_heads", "num_kv_heads", "qk_norm", "rope_theta")
"""Leaves of `attention` that were recorded in the section `model` at first."""


def default() -> ConfigDict:
    """Returns every leaf with its default value, locked: what recipes in `configs/` start from."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ConfigDict:
    """Returns the same leaves as a locked `ConfigDict`."""
    return ConfigDict(to_dict(config)).lock()


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the same leaves as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def with_defaults(recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns recorded sections of leaves, completed with the defaults of leaves added later."""
    completed = to_dict(Config())
    moved = _with_leaves_moved(recorded)
    for section, defaults in completed.items():
        given = moved.get(section, {})
        completed[section] = {**defaults, **given}
    return completed


def given_leaves(config: Config) -> dict[str, Any]:
    """Returns the leaves that have neither their default nor their derived value, by dotted key.

    They are a recipe: `resolve_recorded` makes the same configuration of them.
    """
    open_moe = dataclasses.replace(config.moe, **LEFT_OPEN)
    derived_moe = _derive(dataclasses.replace(config, moe=open_moe)).moe
    expected = {key: each.default for key, each in declared().items()}
    for name in LEFT_OPEN:
        expected[f"moe.{name}"] = getattr(derived_moe, name)
    given = {}
    for key, each in declared().items():
        value = each.value(config)
        if value != expected[key]:
            given[key] = value
    return given


def resolve(source: object, *, typed: Collection[str] = (), varied: Collection[str] = ()) -> Config:
    """Returns a `ConfigDict` or nested mapping as a checked `Config`.

    Args:
      source: sections of leaves; absent ones take their defaults. Anything else that a recipe may
        return is refused.
      typed: dotted keys that were given in addition to a recipe, see `unread.refuse_unread`.
      varied: dotted keys that a sweep varies, likewise.

    Returns:
      A `Config` with derived leaves filled in (`moe.d_expert`, `moe.score`).

    Raises:
      ConfigError: an unknown key, a wrong type, a value out of range, an impossible combination, or
        a leaf that is set and that nothing reads under the other choices.
    """
    config = _resolve_sections(_to_mapping(source))
    refuse_unread(config, typed=typed, varied=varied)
    return config


def resolve_recorded(source: object) -> Config:
    """Returns the configuration of an existing run or arm.

    It does what `resolve` does, but leaves that nothing reads are no error, and leaves may be in
    the section where they were when the run was recorded.

    Raises:
      ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    return _resolve_sections(_with_leaves_moved(_to_mapping(source)))


def _to_mapping(source: object) -> Mapping[str, Any]:
    """Returns sections of leaves; raises `ConfigError` for anything else."""
    values = source.to_dict() if isinstance(source, ConfigDict) else source
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"the configuration is {format_value(repr(values))}; it must be sections of leaves, "
            "such as moejax.config.default() gives"
        )
    return values


def _with_leaves_moved(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns recorded sections with the leaves of `MOVED` in the section where they are today."""
    model = recorded.get("model")
    if not isinstance(model, Mapping) or not set(MOVED) & model.keys():
        return recorded
    attention = {name: value for name, value in model.items() if name in MOVED}
    if "qk_norm" in attention:
        attention["qk_norm"] = "head" if attention["qk_norm"] else "none"
    others = {name: value for name, value in model.items() if name not in MOVED}
    return {**recorded, "model": others, "attention": attention}


def _resolve_sections(values: Mapping[str, Any]) -> Config:
    for name in values:
        if name not in SECTIONS:
            raise ConfigError(
                f"{name} is not a config section; the nearest is {nearest(str(name), SECTIONS)}"
            )
    sections = {section: _section(section, values.get(section, {})) for section in SECTIONS}
    config = _derive(Config(**sections))
    validate(config)
    return config


def _section(section: str, given: Any) -> Any:
    """Returns the dataclass of a section, with each given leaf checked."""
    if not isinstance(given, Mapping):
        keys = [key for key, each in declared().items() if each.section == section]
        raise ConfigError(
            f"{section}={format_value(repr(given))} is no section of leaves; "
            f"set leaves such as {keys[0]}"
        )
    values = {}
    for name, value in given.items():
        key = f"{section}.{name}"
        check_key(key)
        each = declared()[key]
        values[name] = check_value(key, value, each.leaf, each.annotation)
    return SECTIONS[section](**values)


def _derive(config: Config) -> Config:
    """Returns the configuration with the derived leaves of `moe`."""
    moe = config.moe
    has_width = moe.d_expert > 0 or moe.num_experts == 0
    # A width that cannot be derived is no error yet: `moe.per_layer` may set one in every layer, so
    # `validate` looks at the layers that are left without.
    width, remainder = divmod(config.model.d_ff, moe.top_k)
    if not has_width and remainder == 0:
        moe = dataclasses.replace(moe, d_expert=width)
    moe = derive_moe(moe, config.data.seq_len)
    return dataclasses.replace(config, moe=moe)
