"""Which layers have experts: the pattern of ours, and how Qwen, Ernie and Llama 4 say it."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, Mapped, first_of


def layers_with_experts(has_experts: Sequence[bool]) -> Leaves:
    """Returns the leaves of a pattern: every so many layers after the first, or layer by layer.

    Args:
      has_experts: whether each layer has experts.

    Raises:
      HfError: no layer has.
    """
    if not any(has_experts):
        raise HfError("by config.json no layer has experts; the family is one of MoE models")
    first = has_experts.index(True)
    for every in range(1, first + 2):
        first_dense = first - every + 1
        pattern = _pattern(first_dense, every, len(has_experts))
        if pattern == list(has_experts):
            return {"moe.first_dense": first_dense, "moe.every": every}
    dense = [layer for layer, is_sparse in enumerate(has_experts) if not is_sparse]
    return {"moe.per_layer": "; ".join(f"{layer}: dense" for layer in dense)}


def _pattern(first_dense: int, every: int, num_layers: int) -> list[bool]:
    """Returns which layers `moe.first_dense` and `moe.every` give experts."""
    return [
        layer >= first_dense and (layer - first_dense + 1) % every == 0
        for layer in range(num_layers)
    ]


def _read_steps(published: Mapping[str, Any]) -> Leaves:
    """Returns dense layers: layer i is sparse where i + 1 is a multiple of the step."""
    num_layers = first_of(published, ("num_hidden_layers",))
    step = first_of(published, ("decoder_sparse_step",), 1)
    named = first_of(published, ("mlp_only_layers",), [])
    has_experts = []
    for layer in range(num_layers):
        is_at_step = (layer + 1) % step == 0
        has_experts.append(is_at_step and layer not in named)
    return layers_with_experts(has_experts)


def _write_steps(leaves: Leaves) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(leaves["dense_layers"])}


SPARSE_STEPS = Mapped(("decoder_sparse_step", "mlp_only_layers"), _read_steps, _write_steps)
"""As the Qwen families say it: every so many are sparse, but for some."""
