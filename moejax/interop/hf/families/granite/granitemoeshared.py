"""Granite MoE with a shared expert (IBM 2025)."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Leaves, Mapped, first_of
from moejax.interop.hf.llama import OUTER
from moejax.interop.hf.shared.granite import GRANITE, LAYER, MOE, fused_feed_forward
from moejax.interop.hf.tensors import only_with


def _read_shared(published: Mapping[str, Any]) -> Leaves:
    width = first_of(published, ("shared_intermediate_size",), 0)
    if not width:
        return {}
    return {"moe.num_shared_experts": 1, "moe.d_shared": width}


def _write_shared(leaves: Leaves) -> dict[str, Any]:
    if not leaves["moe.num_shared_experts"]:
        return {"shared_intermediate_size": 0}
    width = leaves["moe.d_shared"]
    return {"shared_intermediate_size": width}


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    keys=(*GRANITE, Mapped(("shared_intermediate_size",), _read_shared, _write_shared)),
    outer=OUTER,
    layer=LAYER,
    dense=(),
    moe=(*MOE, *only_with("ffn/shared/down", fused_feed_forward("shared_mlp", "ffn/shared"))),
    shared_beside=True,
)
