"""Qwen3-MoE (Qwen Team 2025)."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    MLP_EXPERTS,
    MLP_ROUTER,
    NORMS,
    OUTER,
    QK_NORM,
    SOFTMAX_ROUTER,
    feed_forward,
)
from moejax.interop.hf.shared.sparse_layers import SPARSE_STEPS
from moejax.interop.hf.shared.windows import Windows

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *DECODER,
        Windows(width=4096, has_switch=True),
        *SOFTMAX_ROUTER,
        SPARSE_STEPS,
        Key("intermediate_size", "model.d_ff"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Always("attention.qk_norm", "head"),
        ATTENTION_BIAS,
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *BIASES, *QK_NORM),
    dense=feed_forward("mlp", "ffn"),
    moe=(*MLP_ROUTER, *MLP_EXPERTS),
)
