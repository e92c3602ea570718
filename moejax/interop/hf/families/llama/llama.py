"""Llama 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024), which are dense."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import ATTENTION, DECODER, NORMS, OUTER, feed_forward

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        *DECODER,
        ATTENTION_BIAS,
        Key("intermediate_size", "model.d_ff"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Key("mlp_bias", "model.ffn_bias", default=False),
        Always("moe.num_experts", 0),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *BIASES),
    dense=feed_forward("mlp", "ffn"),
    moe=(),
)
