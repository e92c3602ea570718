"""The keys of windows of attention, and how patterns of layers are written."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, first_of

OURS = {"sliding_attention": "window", "full_attention": "full"}
"""What `layer_types` lists, and what we call it."""


def shortest_pattern(kinds: Sequence[str]) -> str:
    """Returns the shortest list that gives these kinds of layers when it is repeated."""
    num_layers = len(kinds)
    for period in range(1, num_layers):
        repeated = [kinds[layer % period] for layer in range(num_layers)]
        if repeated == list(kinds):
            return ", ".join(kinds[:period])
    return ", ".join(kinds)


def kinds_of_layers(pattern: str, num_layers: int) -> list[str]:
    """Returns the kind of each layer by a pattern of ours."""
    listed = [kind.strip() for kind in pattern.split(",")]
    return [listed[layer % len(listed)] for layer in range(num_layers)]


def read_layer_types(published: Mapping[str, Any], ours: Mapping[str, str]) -> list[str] | None:
    """Returns what `layer_types` says of each layer in our words; None where it is absent.

    Args:
      published: the content of `config.json`.
      ours: our word for each of theirs.

    Raises:
      HfError: another kind, or another number of layers.
    """
    theirs = published.get("layer_types")
    if theirs is None:
        return None
    num_layers = first_of(published, ("num_hidden_layers",))
    if set(theirs) - ours.keys() or len(theirs) != num_layers:
        raise HfError(
            f"layer_types={theirs} must name {' or '.join(ours)} for each of {num_layers} layers"
        )
    return [ours[kind] for kind in theirs]


def on_all_layers(layer: int, max_window_layers: int) -> bool:
    """Whether a layer has a window where all have one."""
    del layer, max_window_layers
    return True


def on_last_layers(layer: int, max_window_layers: int) -> bool:
    """Whether a layer has a window where those from `max_window_layers` on have one."""
    return layer >= max_window_layers


def on_every_other_layer(layer: int, max_window_layers: int) -> bool:
    """Whether a layer has a window where every other of the first ones has one (Qwen2-MoE)."""
    return layer % 2 == 0 and layer < max_window_layers


@dataclasses.dataclass(frozen=True)
class Windows:
    """The keys of windows.

    Attributes:
      has_window: whether a layer has one where `layer_types` is absent: a function of the layer and
        of `max_window_layers`.
      width: of `sliding_window` where the key is absent; None: no window.
      has_switch: whether windows are off without `use_sliding_window`.
      max_window_layers: where the key is absent.
      chooses_layers: whether `layer_types` may say otherwise.
    """

    has_window: Callable[[int, int], bool] = on_all_layers
    width: int | None = None
    has_switch: bool = False
    max_window_layers: int = 0
    chooses_layers: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it reads."""
        of_layers = ("layer_types", "max_window_layers") if self.has_some_layers else ()
        switch = ("use_sliding_window",) if self.has_switch else ()
        return ("sliding_window", *of_layers, *switch)

    @property
    def has_some_layers(self) -> bool:
        """Whether files have keys of layers with a window."""
        return self.chooses_layers or self.has_switch

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns the width and the pattern of layers."""
        width = published.get("sliding_window", self.width) or 0
        if self.has_switch and not first_of(published, ("use_sliding_window",), False):
            width = 0
        kinds = self._kinds(published, has_windows=width != 0)
        if "window" not in kinds:
            return {"attention.window": 0}
        return {"attention.window": width, "attention.window_layers": shortest_pattern(kinds)}

    def _kinds(self, published: Mapping[str, Any], *, has_windows: bool) -> list[str]:
        num_layers = first_of(published, ("num_hidden_layers",))
        last = first_of(published, ("max_window_layers",), self.max_window_layers)
        kinds = []
        for layer in range(num_layers):
            is_within = has_windows and self.has_window(layer, last)
            kinds.append("window" if is_within else "full")
        named = read_layer_types(published, OURS) if self.has_some_layers else None
        if named is None:
            return kinds
        if named != kinds and not (self.chooses_layers and has_windows):
            raise HfError(
                f"layer_types={published['layer_types']} does not fit the other keys of windows, "
                f"by which layers are {shortest_pattern(kinds)}"
            )
        return named

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns the keys that such leaves are published as."""
        width = leaves["attention.window"]
        written: dict[str, Any] = {"sliding_window": width or None}
        if self.has_switch:
            written["use_sliding_window"] = width > 0
        if self.chooses_layers:
            written["layer_types"] = self._layer_types(leaves)
        return written

    def _layer_types(self, leaves: Leaves) -> list[str]:
        num_layers = leaves["model.num_layers"]
        if not leaves["attention.window"]:
            return ["full_attention"] * num_layers
        theirs = {ours: theirs for theirs, ours in OURS.items()}
        kinds = kinds_of_layers(leaves["attention.window_layers"], num_layers)
        return [theirs[kind] for kind in kinds]
