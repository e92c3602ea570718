"""Which layer of the model has which experts: the pattern, and layers that differ from it.

`moe.first_dense` and `moe.every` say which layers are MoE layers; `moe.per_layer` changes some of
them. From that come the groups of equal layers that the model scans.
"""

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.errors import ConfigError, format_value, nearest, require
from moejax.config.loss_specs import LOSS_SPECS, LOSS_WEIGHTS
from moejax.config.schema.leaf import Leaf, leaf_of, parse_value
from moejax.config.sections.moe import MoeConfig, derive_moe

SHARED = (
    "num_experts",
    "num_zero_experts",
    "num_identity_experts",
    "num_constant_experts",
    "first_dense",
    "every",
    "per_layer",
    "allow_noncausal",
    "expert_dropout",
    "capacity_factor",
    "eval_capacity_factor",
    "save_exchanged",
    "jitter",
    "noise_scale",
    "balance_scope",
    "balance_convention",
    "bias_rate",
    *LOSS_WEIGHTS,
)
"""Leaves of `moe` that are the same for all layers.

They are the pattern itself, knobs, and what losses, statistics and scans share.
"""

UNDERIVED: Mapping[str, Any] = types.MappingProxyType(
    {"score": "auto", "d_router": 0, "slots_per_expert": 0}
)
"""Leaves that are derived for each layer, with the value that leaves them open."""


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Equal layers, or equal blocks of interleaved layers, in succession.

    Attributes:
      kinds: the layers of one block, None for a dense one; only the last may be a MoE layer.
      num: how many blocks.
    """

    kinds: tuple[MoeConfig | None, ...]
    num: int

    @property
    def moe(self) -> MoeConfig | None:
        """The configuration of the MoE layer of each block; None for dense layers."""
        return self.kinds[-1]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `moe.per_layer`.

    Attributes:
      text: as written.
      layers: indices of the layers that it changes.
      changes: leaves of `moe` and their values; None where the layers are dense.
    """

    text: str
    layers: tuple[int, ...]
    changes: dict[str, Any] | None


@functools.lru_cache(maxsize=64)
def layer_kinds(moe: MoeConfig, num_layers: int, seq_len: int) -> tuple[MoeConfig | None, ...]:
    """Returns each layer's experts in the order of the model; None for a dense layer.

    Args:
      moe: resolved, apart from `per_layer`.
      num_layers: of the model.
      seq_len: for leaves that are derived from it.

    Raises:
      ConfigError: `moe.per_layer` cannot be read, names a layer that is absent or dense, or changes
        a leaf that layers share.
    """
    if moe.num_experts == 0:
        require(
            not moe.per_layer,
            f"moe.per_layer={moe.per_layer!r} needs experts, and moe.num_experts=0 has none",
        )
        return (None,) * num_layers
    kinds = _pattern(moe, num_layers)
    for entry in read_entries(moe.per_layer, num_layers):
        for layer in entry.layers:
            kind = kinds[layer]
            if kind is None:
                raise ConfigError(
                    f"moe.per_layer: layer {layer} is dense by moe.first_dense={moe.first_dense}, "
                    f"moe.every={moe.every} or an earlier entry; change that, or leave it out of "
                    f"{entry.text!r}"
                )
            kinds[layer] = None if entry.changes is None else _changed(kind, entry.changes, seq_len)
    return tuple(kinds)


def _pattern(moe: MoeConfig, num_layers: int) -> list[MoeConfig | None]:
    """Returns the layers by `moe.first_dense` and `moe.every` alone."""
    base = dataclasses.replace(moe, per_layer="")
    kinds: list[MoeConfig | None] = [None] * num_layers
    # The last layer of each `every` is the MoE layer.
    first_moe_layer = moe.first_dense + moe.every - 1
    for layer in range(first_moe_layer, num_layers, moe.every):
        kinds[layer] = base
    return kinds


def layer_groups(
    kinds: tuple[MoeConfig | None, ...], first_dense: int, every: int
) -> tuple[LayerGroup, ...]:
    """Returns the layers as groups of equal blocks, in order.

    A block has the `every` layers of the pattern if it ends in a MoE layer, and one layer
    otherwise.

    Args:
      kinds: from `layer_kinds`.
      first_dense: of the pattern.
      every: of the pattern.
    """
    single_layers = [(kind,) for kind in kinds]
    blocks: list[tuple[MoeConfig | None, ...]] = [*single_layers[:first_dense]]
    for start in range(first_dense, len(kinds), every):
        block = kinds[start : start + every]
        if block[-1] is None:
            blocks += single_layers[start : start + every]
        else:
            blocks.append(block)
    groups = []
    for block, equal_blocks in itertools.groupby(blocks):
        num = len([*equal_blocks])
        groups.append(LayerGroup(block, num))
    return tuple(groups)


def read_entries(per_layer: str, num_layers: int) -> list[Entry]:
    """Returns the entries of `moe.per_layer`, in order.

    Raises:
      ConfigError: an entry that cannot be read, or that names a layer that is absent.
    """
    entries = []
    for text in filter(None, map(str.strip, per_layer.split(";"))):
        layers, colon, changes = text.partition(":")
        require(
            bool(colon),
            f"moe.per_layer: {format_value(text)!r} must have the form LAYERS: CHANGES, such as "
            "0-1: router=hash or -1: dense",
        )
        # Changes are read first, so that a mistake in both is reported for them.
        read_changes = _read_changes(changes)
        entries.append(Entry(text, tuple(_read_layers(layers, num_layers)), read_changes))
    return entries


def _read_layers(text: str, num_layers: int) -> Iterator[int]:
    """Yields layers from "0", "-1", "2-4" and lists of those with commas."""
    for part in map(str.strip, text.split(",")):
        try:
            first, last = _read_range(part, num_layers)
        except ValueError as error:
            raise ConfigError(
                f"moe.per_layer: {format_value(part)!r} is no layer; use a number such as 0, -1 "
                "for the last, or a range such as 2-4"
            ) from error
        require(
            0 <= first <= last < num_layers,
            f"moe.per_layer: {format_value(part)!r} must be within the "
            f"model.num_layers={num_layers} layers 0 to {num_layers - 1}",
        )
        yield from range(first, last + 1)


def _read_range(part: str, num_layers: int) -> tuple[int, int]:
    """Returns the first and the last layer of "2", "2-4", "-3" (from the end) or "-3-4"."""
    is_from_end = part.startswith("-")
    low, dash, high = part.removeprefix("-").partition("-")
    first = num_layers - int(low) if is_from_end else int(low)
    last = int(high) if dash else first
    return first, last


def _read_changes(text: str) -> dict[str, Any] | None:
    """Returns leaves and values from "router=hash top_k=1"; None for "dense"."""
    if text.split() == ["dense"]:
        return None
    fields = _fields()
    changes: dict[str, Any] = {}
    for change in text.split():
        name, _, value = change.partition("=")
        if name in SHARED:
            raise ConfigError(
                f"moe.per_layer: moe.{name} is the same for all layers; set moe.{name} instead"
            )
        if name not in fields:
            raise ConfigError(
                f"moe.per_layer: {format_value(name)!r} is not a leaf of moe; the nearest is "
                f"{nearest(name, fields)}"
            )
        require(
            name not in changes, f"moe.per_layer: {text.strip()!r} sets {name} twice; leave one out"
        )
        leaf, annotation = fields[name]
        changes[name] = parse_value(f"moe.per_layer: moe.{name}", value, leaf, annotation)
    require(
        bool(changes),
        f"moe.per_layer: {text!r} changes nothing; write dense, or leaves such as router=hash",
    )
    return changes


@functools.cache
def _fields() -> Mapping[str, tuple[Leaf, Any]]:
    """Returns the leaves that a layer can change, with their declarations and types."""
    hints = typing.get_type_hints(MoeConfig)
    fields = {}
    for field in dataclasses.fields(MoeConfig):
        if field.name not in SHARED:
            fields[field.name] = (leaf_of(field), hints[field.name])
    return types.MappingProxyType(fields)


def _changed(kind: MoeConfig, changes: dict[str, Any], seq_len: int) -> MoeConfig:
    """Returns the layer with its changes; what follows from the router follows from the new one."""
    new_router = "router" in changes
    open_leaves = {**UNDERIVED} if new_router else _derived_leaves(kind, seq_len)
    all_changes = open_leaves | changes
    changed = dataclasses.replace(kind, **all_changes)
    return _without_unfit(derive_moe(changed, seq_len))


def _derived_leaves(kind: MoeConfig, seq_len: int) -> dict[str, Any]:
    """Returns, of `UNDERIVED`, the leaves that have the value derived for them."""
    derived = derive_moe(dataclasses.replace(kind, **UNDERIVED), seq_len)
    is_derived = {name: getattr(kind, name) == getattr(derived, name) for name in UNDERIVED}
    return {name: value for name, value in UNDERIVED.items() if is_derived[name]}


def _without_unfit(kind: MoeConfig) -> MoeConfig:
    """Returns the layer without what does not go with its router.

    Losses and knobs are set for the entire model, so a layer that cannot have one leaves it out
    rather than refusing it.
    """
    unfit = []
    for name, spec in LOSS_SPECS.items():
        if kind.router not in spec.fitting_routers:
            unfit.append(f"{name}_weight")
    if kind.score == "uniform":
        unfit.append("jitter")
    zeros: dict[str, Any] = dict.fromkeys(unfit, 0.0)
    return dataclasses.replace(kind, **zeros)
