"""Leaves that are set and that nothing reads under the other choices.

What a leaf needs is declared at the leaf (`Leaf.needs`); here it is evaluated. A leaf of `moe` is
read if any layer reads it. A dense model reads none of `moe` and `alarms` but `moe.num_experts`; a
recipe may set them all the same, so that its dense twin is the recipe with `moe.num_experts=0`.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from moejax.config.errors import ConfigError, format_value
from moejax.config.layer_pattern import read_entries
from moejax.config.schema.tree import Declared, declared
from moejax.config.sections.moe import MoeConfig, derive_moe
from moejax.config.sections.root import Config

OF_EXPERTS = ("moe", "alarms")
"""Sections that a dense model does not read, apart from the number of experts."""


class UnreadError(ConfigError):
    """A leaf that is set and that nothing reads: the message names what it needs."""


@dataclasses.dataclass(frozen=True)
class LayerReading:
    """A configuration as one of its layers reads it; see `needs.Reading`.

    Attributes:
      config: resolved.
      kind: the experts of the layer; those of the configuration where it is dense.
    """

    config: Config
    kind: MoeConfig

    def get(self, key: str) -> Any:
        """The value of a leaf."""
        section, name = key.split(".")
        return getattr(self.kind if section == "moe" else getattr(self.config, section), name)

    def is_derived(self, key: str) -> bool:
        """Whether the leaf has the value that `resolve` derives where none is given."""
        if key == "moe.d_expert":
            return self.config.moe.d_expert * self.config.moe.top_k == self.config.model.d_ff
        name = key.removeprefix("moe.")
        left_open: dict[str, Any] = {name: 0}
        derived = derive_moe(dataclasses.replace(self.kind, **left_open), self.config.data.seq_len)
        return getattr(derived, name) == getattr(self.kind, name)

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
    if each.section in OF_EXPERTS and key != "moe.num_experts" and not config.moe.num_experts:
        return False
    if each.section == "moe" and _is_overridden(config, each):
        return False
    need = each.leaf.needs
    return need is None or any(need.holds(reading) for reading in _readings(config))


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
      typed: those that were given beside a recipe: of these, none may rest.
      varied: leaves that a sweep varies: what needs one of them may be read in some of its arms.

    Raises:
      UnreadError: naming the leaf, what it needs, and the remedy.
    """
    for key in declared() if keys is None else keys:
        each = declared()[key]
        if each.value(config) == each.default or is_read(config, key):
            continue
        if _may_be_read(each, varied) or (key not in typed and _may_rest(config, each)):
            continue
        raise UnreadError(_explain(config, each))
    if keys is None or "moe.per_layer" in keys:
        _refuse_unread_in_layers(config)


def _readings(config: Config) -> list[LayerReading]:
    kinds = {id(kind): kind for kind in config.layers if kind is not None}
    return [LayerReading(config, kind) for kind in kinds.values() or [config.moe]]


def _is_overridden(config: Config, each: Declared) -> bool:
    """Whether `moe.per_layer` gives every layer another value."""
    if not config.moe.per_layer or each.key == "moe.per_layer":
        return False
    value = each.value(config)
    if any(getattr(kind, each.name) == value for kind in config.layers if kind is not None):
        return False
    return not _is_derived(config, each) and not _decides_width(config, each)


def _decides_width(config: Config, each: Declared) -> bool:
    """Whether the width of experts follows from it: by default d_ff / top_k, whatever K layers have."""
    return each.name == "top_k" and LayerReading(config, config.moe).is_derived("moe.d_expert")


def _is_derived(config: Config, each: Declared) -> bool:
    reading = LayerReading(config, config.moe)
    if each.name == "score":
        open_score = dataclasses.replace(config.moe, score="auto")
        return derive_moe(open_score, config.data.seq_len).score == config.moe.score
    return each.name in ("d_expert", "d_router", "slots_per_expert") and reading.is_derived(
        each.key
    )


def _may_rest(config: Config, each: Declared) -> bool:
    is_dense = each.section in OF_EXPERTS and not config.moe.num_experts
    return each.leaf.may_rest or is_dense


def _may_be_read(each: Declared, varied: Collection[str]) -> bool:
    """Whether it could be where other leaves vary."""
    keys = {*each.leaf.needs.keys} if each.leaf.needs else set()
    for key in [*keys]:  # a schedule needs what the leaf needs that it scales
        scaled = declared()[key].leaf.needs
        keys |= {*scaled.keys} if scaled else set()
    if each.section in OF_EXPERTS or each.section == "schedule":
        keys |= {"moe.num_experts", "moe.per_layer"}
    return not keys.isdisjoint(varied)


def _explain(config: Config, each: Declared) -> str:
    value, need = (
        format_value(repr(each.value(config)) if each.annotation is str else each.value(config)),
        each.leaf.needs,
    )
    leave = (
        f"leave {each.key} at {each.default}" if each.default != "" else f"leave {each.key} empty"
    )
    if each.section in OF_EXPERTS and not config.moe.num_experts:
        return f"{each.key}={value} does nothing in a dense model (moe.num_experts=0); set moe.num_experts, or {leave}"
    if need is None or any(need.holds(reading) for reading in _readings(config)):
        return f"{each.key}={value} does nothing: moe.per_layer={config.moe.per_layer!r} sets it in every layer; {leave}"
    others = [(key, declared()[key].value(config)) for key in need.keys]
    having = ", ".join(f"{key}={format_value(other)}" for key, other in others if other != "")
    return f"{each.key}={value} does nothing with {having}: it needs {each.needs_text}; set that, or {leave}"


def _refuse_unread_in_layers(config: Config) -> None:
    """The same for what `moe.per_layer` sets, in the layers in which it does."""
    if not config.moe.num_experts:
        return
    for entry in read_entries(config.moe.per_layer, config.model.num_layers):
        for layer in dict.fromkeys(entry.layers):
            kind = config.layers[layer]
            for name, value in (entry.changes or {}).items():
                each = declared()[f"moe.{name}"]
                need = each.leaf.needs
                if kind is None or need is None or each.leaf.may_rest or value == each.default:
                    continue
                if not need.holds(LayerReading(config, kind)):
                    raise UnreadError(
                        f"moe.per_layer: {name}={value} does nothing in layer {layer}: it needs {need.text}; set that "
                        f"there, or leave it out of {entry.text!r}"
                    )
