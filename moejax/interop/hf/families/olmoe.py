"""OLMoE (Muennighoff et al. 2024)."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    MLP_EXPERTS,
    MLP_ROUTER,
    NORMS,
    OUTER,
    SOFTMAX_ROUTER,
)
from moejax.interop.hf.tensors import Tensor

WHOLE_NORM = (
    Tensor("self_attn.q_norm.weight", "X", "mixer/query_norm/scale", "X"),
    Tensor("self_attn.k_norm.weight", "X", "mixer/key_norm/scale", "X"),
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
        Fixed("attention_bias", False),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *WHOLE_NORM),
    dense=(),
    moe=(*MLP_ROUTER, *MLP_EXPERTS),
)
