"""GLM-4.5 and GLM-4.6 (Zhipu AI 2025)."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    NORMS,
    OUTER,
    QK_NORM,
    QKV_BIAS,
    feed_forward,
)
from moejax.interop.hf.shared.further_layers import KEYS, is_of_further_layers
from moejax.interop.hf.shared.partial_rope import partial_rope
from moejax.interop.hf.shared.sigmoid_router import SIGMOID_MOE, sigmoid_router
from moejax.interop.hf.tensors import only_with


def _read_norm(published: Mapping[str, Any]) -> Leaves:
    has_norm = first_of(published, ("use_qk_norm",), False)
    return {"attention.qk_norm": "head" if has_norm else "none"}


def _write_norm(leaves: Leaves) -> dict[str, Any]:
    return {"use_qk_norm": leaves["attention.qk_norm"] != "none"}


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *DECODER,
        partial_rope("partial_rotary_factor", fraction=0.5),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Key("attention_bias", "attention.qkv_bias", default=False),
        Mapped(("use_qk_norm",), _read_norm, _write_norm),
        *sigmoid_router(
            {
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
            }
        ),
        Ignored(*KEYS),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *QKV_BIAS, *only_with("mixer/query_norm/scale", QK_NORM)),
    dense=feed_forward("mlp", "ffn"),
    moe=SIGMOID_MOE,
    is_ignored=is_of_further_layers,
)
