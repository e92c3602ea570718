"""Which layers are dense, as the Qwen families say it: every so many are sparse, but for some."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.keys import Leaves, Mapped, first_of


def _read(published: Mapping[str, Any]) -> Leaves:
    """Returns dense layers: layer i is sparse where i + 1 is a multiple of the step."""
    num_layers = first_of(published, ("num_hidden_layers",))
    step = first_of(published, ("decoder_sparse_step",), 1)
    named = first_of(published, ("mlp_only_layers",), [])
    entries = []
    for layer in range(num_layers):
        is_between_steps = (layer + 1) % step != 0
        if is_between_steps or layer in named:
            entries.append(f"{layer}: dense")
    return {"moe.per_layer": "; ".join(entries)}


def _write(leaves: Leaves) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(leaves["dense_layers"])}


SPARSE_STEPS = Mapped(("decoder_sparse_step", "mlp_only_layers"), _read, _write)
