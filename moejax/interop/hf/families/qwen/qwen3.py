"""Qwen3 (Qwen Team 2025), the dense ones."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    NORMS,
    OUTER,
    QK_NORM,
    decoder,
    feed_forward,
)
from moejax.interop.hf.shared.windows import Windows, on_last_layers

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *decoder(head_dim=128),
        ATTENTION_BIAS,
        Windows(
            on_last_layers,
            width=4096,
            has_switch=True,
            max_window_layers=28,
            chooses_layers=True,
        ),
        Key("intermediate_size", "model.d_ff"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Always("attention.qk_norm", "head"),
        Always("moe.num_experts", 0),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *BIASES, *QK_NORM),
    dense=feed_forward("mlp", "ffn"),
    moe=(),
)
