"""Leaves that are set and that nothing reads under the other choices.

What a leaf needs is declared at the leaf (`Leaf.needs`); here it is evaluated. A leaf of `moe` is
read if any layer reads it. A dense model reads none of `moe` and `alarms` but `moe.num_experts`; a
recipe may set them nevertheless, so that its dense twin is the recipe with `moe.num_experts=0`.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from moejax.config.errors import ConfigError, format_value
from moejax.config.layer_pattern import Entry, read_entries
from moejax.config.schema.needs import Need
from moejax.config.schema.tree import Declared, declared
from moejax.config.sections.moe import MoeConfig, derive_moe
from moejax.config.sections.root import Config

OF_EXPERTS = ("moe", "alarms")
"""Sections that a dense model does not read, apart from the number of experts."""

DERIVED_NUMBERS = ("d_expert", "d_router", "slots_per_expert")
"""Leaves of `moe` that are derived if they are 0."""


class UnreadError(ConfigError):
    """A leaf that is set and that nothing reads: the message names what it needs."""


@dataclasses.dataclass(frozen=True)
class LayerReading:
    """A configuration as one of its layers reads it; see `needs.Reading`.

    Attributes:
      config: resolved.
      kind: the experts of the layer; those of the configuration if it is dense.
    """

    config: Config
    kind: MoeConfig

    def get(self, key: str) -> Any:
        """Returns the value of a leaf."""
        section, name = key.split(".")
        owner = self.kind if section == "moe" else getattr(self.config, section)
        return getattr(owner, name)

    def is_derived(self, key: str) -> bool:
        """Whether the leaf has the value that `resolve` derives if none is given."""
        if key == "moe.d_expert":
            active_width = self.config.moe.d_expert * self.config.moe.top_k
            return active_width == self.config.model.d_ff
        name = key.removeprefix("moe.")
        left_open: dict[str, Any] = {name: 0}
        underived = dataclasses.replace(self.kind, **left_open)
        derived = derive_moe(underived, self.config.data.seq_len)
        value = getattr(self.kind, name)
        return value == getattr(derived, name)

    def has_dense_layer(self) -> bool:
        """Whether a layer of the model is dense."""
        return self.config.num_moe_layers < self.config.model.num_layers

    def is_read(self, key: str) -> bool:
        """Whether another leaf is read in this layer."""
        need = declared()[key].leaf.needs
        return self.config.moe.num_experts > 0 and (need is None or need.holds(self))


def is_read(config: Config, key: str) -> bool:
    """Whether anything reads a leaf under the other choices of a resolved configuration."""
    each = declared()[key]
    if key != "moe.num_experts" and _is_for_absent_experts(config, each):
        return False
    if each.section == "moe" and _is_overridden(config, each):
        return False
    return _is_met(config, each.leaf.needs)


def refuse_unread(
    config: Config,
    *,
    keys: Iterable[str] | None = None,
    typed: Collection[str] = (),
    varied: Collection[str] = (),
) -> None:
    """Refuses leaves that differ from their default and that nothing reads.

    Args:
      config: resolved.
      keys: which leaves; all by default.
      typed: leaves that were given in addition to a recipe: each of these must be read.
      varied: leaves that a sweep varies: what needs one of them may be read in some of its arms.

    Raises:
      UnreadError: naming the leaf, what it needs, and the remedy.
    """
    for key in declared() if keys is None else keys:
        each = declared()[key]
        if each.value(config) == each.default or is_read(config, key):
            continue
        is_excused = key not in typed and _may_be_unread(config, each)
        if is_excused or _varies_with(each, varied):
            continue
        raise UnreadError(_explain(config, each))
    if keys is None or "moe.per_layer" in keys:
        _refuse_unread_in_layers(config)


def _readings(config: Config) -> list[LayerReading]:
    """Returns the configuration as each distinct MoE layer reads it."""
    kinds = {id(kind): kind for kind in config.layers if kind is not None}
    return [LayerReading(config, kind) for kind in kinds.values() or [config.moe]]


def _is_met(config: Config, need: Need | None) -> bool:
    """Whether a need is met in any layer."""
    return need is None or any(need.holds(reading) for reading in _readings(config))


def _is_for_absent_experts(config: Config, each: Declared) -> bool:
    """Whether the leaf is about experts, of which a dense model has none."""
    return each.section in OF_EXPERTS and not config.moe.num_experts


def _is_overridden(config: Config, each: Declared) -> bool:
    """Whether `moe.per_layer` gives every layer another value."""
    if not config.moe.per_layer or each.key == "moe.per_layer":
        return False
    value = each.value(config)
    kinds = [kind for kind in config.layers if kind is not None]
    if any(getattr(kind, each.name) == value for kind in kinds):
        return False
    return not _is_derived(config, each) and not _decides_width(config, each)


def _decides_width(config: Config, each: Declared) -> bool:
    """Whether the width of experts follows from the leaf.

    By default it is d_ff / top_k of the model, also in layers with another top_k.
    """
    reading = LayerReading(config, config.moe)
    return each.name == "top_k" and reading.is_derived("moe.d_expert")


def _is_derived(config: Config, each: Declared) -> bool:
    """Whether the leaf of the model has its derived value."""
    if each.name == "score":
        open_score = dataclasses.replace(config.moe, score="auto")
        derived = derive_moe(open_score, config.data.seq_len)
        return derived.score == config.moe.score
    reading = LayerReading(config, config.moe)
    return each.name in DERIVED_NUMBERS and reading.is_derived(each.key)


def _may_be_unread(config: Config, each: Declared) -> bool:
    """Whether a recipe may set the leaf although nothing reads it."""
    return each.leaf.may_be_unread or _is_for_absent_experts(config, each)


def _varies_with(each: Declared, varied: Collection[str]) -> bool:
    """Whether it depends on varied leaves if anything reads this one."""
    decisive = set(each.leaf.needs.keys) if each.leaf.needs else set()
    # A schedule also needs what the leaf needs that it scales.
    for key in [*decisive]:
        scaled_need = declared()[key].leaf.needs
        if scaled_need:
            decisive.update(scaled_need.keys)
    if each.section in OF_EXPERTS or each.section == "schedule":
        decisive.update(("moe.num_experts", "moe.per_layer"))
    return not decisive.isdisjoint(varied)


def _explain(config: Config, each: Declared) -> str:
    """Returns the message that refuses a leaf."""
    value = each.value(config)
    given = f"{each.key}={_shown(each, value)}"
    leave = f"leave {each.key} " + ("empty" if each.default == "" else f"at {each.default}")
    if _is_for_absent_experts(config, each):
        return (
            f"{given} does nothing in a dense model (moe.num_experts=0); "
            f"set moe.num_experts, or {leave}"
        )
    need = each.leaf.needs
    if need is None or _is_met(config, need):
        return (
            f"{given} does nothing: moe.per_layer={config.moe.per_layer!r} "
            f"sets it in every layer; {leave}"
        )
    deciding = _deciding_values(config, need)
    where = f" with {deciding}" if deciding else ""
    return f"{given} does nothing{where}: it needs {each.needs_text}; set that, or {leave}"


def _shown(each: Declared, value: Any) -> str:
    """Returns the value of a leaf for a message; text of any kind in quotes."""
    return format_value(repr(value) if each.annotation is str else value)


def _deciding_values(config: Config, need: Need) -> str:
    """Returns the leaves that decide about a need, as they are set; empty ones are left out."""
    values = {key: declared()[key].value(config) for key in need.keys}
    shown = [f"{key}={format_value(value)}" for key, value in values.items() if value != ""]
    return ", ".join(shown)


def _refuse_unread_in_layers(config: Config) -> None:
    """Refuses what `moe.per_layer` sets and its layer does not read."""
    if not config.moe.num_experts:
        return
    for entry in read_entries(config.moe.per_layer, config.model.num_layers):
        for layer in dict.fromkeys(entry.layers):
            _refuse_unread_in_layer(config, entry, layer)


def _refuse_unread_in_layer(config: Config, entry: Entry, layer: int) -> None:
    kind = config.layers[layer]
    if kind is None:
        return
    reading = LayerReading(config, kind)
    for name, value in (entry.changes or {}).items():
        each = declared()[f"moe.{name}"]
        need = each.leaf.needs
        if need is None or each.leaf.may_be_unread or value == each.default:
            continue
        if not need.holds(reading):
            raise UnreadError(
                f"moe.per_layer: {name}={value} does nothing in layer {layer}: it needs "
                f"{need.text}; set that there, or leave it out of {entry.text!r}"
            )
