"""Mistral 7B (Jiang et al. 2023), whose layers all have a window or none."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import ATTENTION, DECODER, NORMS, OUTER, feed_forward
from moejax.interop.hf.shared.windows import Windows

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(
        *DECODER,
        Windows(width=4096),
        Key("intermediate_size", "model.d_ff"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Always("moe.num_experts", 0),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION),
    dense=feed_forward("mlp", "ffn"),
    moe=(),
)
