"""Which layer of the model has which experts: the pattern, and layers that differ from it.

`moe.first_dense` and `moe.every` say which layers are MoE layers; `moe.per_layer` changes some of
them. From that come the runs of equal layers that the model scans.
"""

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config.errors import ConfigError, format_value, nearest, require
from moejax.config.router_rules import ROUTER_RULES
from moejax.config.schema.leaf import Leaf, leaf_of, parse_value
from moejax.config.sections.moe import MoeConfig, derive_moe

SHARED = (
    "num_experts", "num_zero_experts", "num_identity_experts", "num_constant_experts", "first_dense", "every",
    "per_layer", "allow_noncausal", "expert_dropout", "capacity_factor", "eval_capacity_factor", "save_exchanged",
    "jitter", "noise_scale", "balance_weight", "balance_scope", "balance_convention", "sequence_balance_weight",
    "importance_weight", "vmoe_importance_weight", "load_weight", "vmoe_load_weight", "z_weight", "bias_rate",
)  # fmt: skip
"""Leaves of `moe` that are the same for all layers: the pattern itself, knobs, and what losses, statistics and scans
share."""


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Equal layers, or equal periods of layers, in succession.

    Attributes:
      kinds: the layers of one period, None for a dense one; only the last may be a MoE layer.
      num: how many periods.
    """

    kinds: tuple[MoeConfig | None, ...]
    num: int

    @property
    def moe(self) -> MoeConfig | None:
        """The configuration of its MoE layers, of which there is one a period; None for dense layers."""
        return self.kinds[-1]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of `moe.per_layer`.

    Attributes:
      text: as written.
      layers: which it is about.
      changes: leaves of `moe` and their values; None where the layers are dense.
    """

    text: str
    layers: tuple[int, ...]
    changes: dict[str, Any] | None


@functools.lru_cache(maxsize=64)
def layer_kinds(moe: MoeConfig, num_layers: int, seq_len: int) -> tuple[MoeConfig | None, ...]:
    """Each layer's configuration in the order of the model; None for a dense layer.

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
    base = dataclasses.replace(moe, per_layer="")
    kinds: list[MoeConfig | None] = [
        base if i >= moe.first_dense and (i - moe.first_dense + 1) % moe.every == 0 else None
        for i in range(num_layers)
    ]
    for entry in read_entries(moe.per_layer, num_layers):
        for layer in entry.layers:
            kind = kinds[layer]
            if kind is None:
                raise ConfigError(
                    f"moe.per_layer: layer {layer} is dense by moe.first_dense={moe.first_dense}, "
                    f"moe.every={moe.every} or an earlier entry; change that, or leave it out of {entry.text!r}"
                )
            kinds[layer] = None if entry.changes is None else _changed(kind, entry.changes, seq_len)
    return tuple(kinds)


def layer_groups(
    kinds: tuple[MoeConfig | None, ...], first_dense: int, every: int
) -> tuple[LayerGroup, ...]:
    """The layers as runs of equal periods, in order; a period is as long as the pattern's where it ends in a MoE layer.

    Args:
      kinds: from `layer_kinds`.
      first_dense: of the pattern.
      every: of the pattern.
    """
    units: list[tuple[MoeConfig | None, ...]] = [(kind,) for kind in kinds[:first_dense]]
    for start in range(first_dense, len(kinds), every):
        period = kinds[start : start + every]
        units += [(kind,) for kind in period] if period[-1] is None else [period]
    return tuple(LayerGroup(kinds, len(list(equal))) for kinds, equal in itertools.groupby(units))


def read_entries(per_layer: str, num_layers: int) -> list[Entry]:
    """The entries of `moe.per_layer`, in order.

    Raises:
      ConfigError: an entry that cannot be read, or that names a layer that is absent.
    """
    entries = []
    for text in filter(None, map(str.strip, per_layer.split(";"))):
        where, colon, what = text.partition(":")
        require(
            bool(colon),
            f"moe.per_layer: {format_value(text)!r} must have the form LAYERS: CHANGES, such as 0-1: router=hash or -1: dense",
        )
        changes = _read_changes(what)
        entries.append(Entry(text, tuple(_read_layers(where, num_layers)), changes))
    return entries


def _read_layers(text: str, num_layers: int) -> Iterator[int]:
    """Layers from "0", "-1", "2-4" and lists of those with commas."""
    for part in text.split(","):
        part = part.strip()
        low, dash, high = part[1:].partition("-") if part.startswith("-") else part.partition("-")
        try:
            first = int(low) if not part.startswith("-") else num_layers - int(low)
            last = int(high) if dash else first
        except ValueError as error:
            raise ConfigError(
                f"moe.per_layer: {format_value(part)!r} is no layer; use a number such as 0, -1 for the last, or a range such "
                "as 2-4"
            ) from error
        require(
            0 <= first <= last < num_layers,
            f"moe.per_layer: {format_value(part)!r} must be within the model.num_layers={num_layers} layers 0 to "
            f"{num_layers - 1}",
        )
        yield from range(first, last + 1)


def _read_changes(text: str) -> dict[str, Any] | None:
    """Leaves and values from "router=hash top_k=1"; None for "dense"."""
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
                f"moe.per_layer: {format_value(name)!r} is not a leaf of moe; the nearest is {nearest(name, fields)}"
            )
        require(
            name not in changes, f"moe.per_layer: {text.strip()!r} sets {name} twice; leave one out"
        )
        changes[name] = parse_value(f"moe.per_layer: moe.{name}", value, *fields[name])
    require(
        bool(changes),
        f"moe.per_layer: {text!r} changes nothing; write dense, or leaves such as router=hash",
    )
    return changes


@functools.cache
def _fields() -> Mapping[str, tuple[Leaf, Any]]:
    """What is declared of the leaves that a layer can change, and their types; read once."""
    hints = typing.get_type_hints(MoeConfig)
    fields = [field for field in dataclasses.fields(MoeConfig) if field.name not in SHARED]
    return types.MappingProxyType(
        {field.name: (leaf_of(field), hints[field.name]) for field in fields}
    )


def _changed(kind: MoeConfig, changes: dict[str, Any], seq_len: int) -> MoeConfig:
    """The layer with its changes; what follows from the router follows from the new one."""
    underived: dict[str, Any] = {"score": "auto", "d_router": 0, "slots_per_expert": 0}
    derived = derive_moe(dataclasses.replace(kind, **underived), seq_len)
    open_leaves = {
        name: value
        for name, value in underived.items()
        if "router" in changes or getattr(kind, name) == getattr(derived, name)
    }
    changes = open_leaves | changes
    kind = derive_moe(dataclasses.replace(kind, **changes), seq_len)
    # What does not go with a layer's router is left out there, for losses and knobs are the
    # whole model's.
    unfit: list[str] = [] if kind.router == "noisy_topk" else ["load_weight", "vmoe_load_weight"]
    if not ROUTER_RULES[kind.router].takes_capacity:
        unfit += ["sequence_balance_weight", "importance_weight", "vmoe_importance_weight"]
    if kind.score == "uniform":
        unfit.append("jitter")
    zeros: dict[str, Any] = dict.fromkeys(unfit, 0.0)
    return dataclasses.replace(kind, **zeros)
