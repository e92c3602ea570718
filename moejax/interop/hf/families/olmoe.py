"""OLMoE (Muennighoff et al. 2024)."""

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
    SOFTMAX_ROUTER,
    WHOLE_QK_NORM,
)

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=(
        *DECODER,
        *SOFTMAX_ROUTER,
        Key("intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Key("clip_qkv", "attention.clip_qkv", default=0.0),
        Always("attention.qk_norm", "whole"),
        ATTENTION_BIAS,
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *BIASES, *WHOLE_QK_NORM),
    dense=(),
    moe=(*MLP_ROUTER, *MLP_EXPERTS),
)
