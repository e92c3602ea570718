"""Mixtral 8x7B and 8x22B (Jiang et al. 2024)."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    NORMS,
    OUTER,
    experts,
    experts_per_token,
)
from moejax.interop.hf.shared.windows import Windows
from moejax.interop.hf.tensors import Tensor

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *DECODER,
        Windows(),
        *experts_per_token(Always("moe.renormalize", True), "num_local_experts", "num_experts"),
        Key("intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=1e6),
        Fixed("router_jitter_noise", 0.0),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION),
    dense=(),
    moe=(
        Tensor("block_sparse_moe.gate.weight", "E D", "ffn/router/kernel", "D E"),
        *experts("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
    ),
)
