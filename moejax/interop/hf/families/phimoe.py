"""Phi-3.5-MoE (Abdin et al. 2024)."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Mapped, first_of, without
from moejax.interop.hf.llama import ATTENTION, DECODER, NORMS, OUTER, experts
from moejax.interop.hf.long_rope import LONG_ROPE
from moejax.interop.hf.tensors import Tensor

WINDOW = Mapped(
    ("sliding_window",),
    lambda published: {"attention.window": first_of(published, ("sliding_window",), 0)},
    lambda leaves: {"sliding_window": leaves["attention.window"] or None},
)
"""The width of the window of all layers."""

NORM_BIASES = (
    Tensor("input_layernorm.bias", "D", "mixer_norm/bias", "D"),
    Tensor("post_attention_layernorm.bias", "D", "ffn_norm/bias", "D"),
)

FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    keys=(
        *without(DECODER, "rope_scaling"),
        LONG_ROPE,
        ATTENTION_BIAS,
        Key("lm_head_bias", "model.logits_bias", default=False),
        WINDOW,
        Key("num_local_experts", "moe.num_experts", aliases=("num_experts",)),
        Key("intermediate_size", "moe.d_expert"),
        Key("router_jitter_noise", "moe.mixer_threshold", default=0.01),
        Key("router_aux_loss_coef", "moe.balance_weight", default=0.001),
        Key("rope_theta", "attention.rope_theta", default=1e6),
        Fixed("num_experts_per_tok", 2),
        Ignored("input_jitter_noise"),  # of training alone
        Always("model.norm", "layer"),
        Always("moe.top_k", 2),
        Always("moe.router", "sparse_mixer"),
        Always("moe.z_weight", 0.0),
    ),
    outer=(
        *OUTER,
        Tensor("model.norm.bias", "D", "final_norm/bias", "D"),
        Tensor("lm_head.bias", "V", "logits_bias", "V", only_with="logits_bias"),
    ),
    layer=(*NORMS, *NORM_BIASES, *ATTENTION, *BIASES),
    dense=(),
    moe=(
        Tensor("block_sparse_moe.gate.weight", "E D", "ffn/router/kernel", "D E"),
        *experts("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
    ),
)
