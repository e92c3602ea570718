"""FlexOlmo (Shi et al. 2025)."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    MLP_EXPERTS,
    MLP_ROUTER,
    OUTER,
    SOFTMAX_ROUTER,
    WHOLE_QK_NORM,
)
from moejax.interop.hf.tensors import Tensor

NORMS_AFTER = (
    Tensor("post_attention_layernorm.weight", "D", "mixer_post_norm/scale", "D"),
    Tensor("post_feedforward_layernorm.weight", "D", "ffn_post_norm/scale", "D"),
)

FAMILY = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    keys=(
        *DECODER,
        *SOFTMAX_ROUTER,
        ATTENTION_BIAS,
        Key("intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=5e5),
        Always("attention.qk_norm", "whole"),
        Always("model.norm_order", "post"),
    ),
    outer=OUTER,
    layer=(*NORMS_AFTER, *ATTENTION, *BIASES, *WHOLE_QK_NORM),
    dense=(),
    moe=(*MLP_ROUTER, *MLP_EXPERTS),
)
