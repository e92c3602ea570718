"""Qwen3-MoE (Qwen Team 2025)."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    MLP_EXPERTS,
    MLP_ROUTER,
    NO_WINDOW,
    NORMS,
    OUTER,
    QK_NORM,
    SOFTMAX_ROUTER,
    feed_forward,
)
from moejax.interop.hf.sparse_steps import SPARSE_STEPS

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *DECODER,
        NO_WINDOW,
        *SOFTMAX_ROUTER,
        SPARSE_STEPS,
        Key("intermediate_size", "model.d_ff"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Always("attention.qk_norm", "head"),
        Fixed("attention_bias", False),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *QK_NORM),
    dense=feed_forward("mlp", "ffn"),
    moe=(*MLP_ROUTER, *MLP_EXPERTS),
)
