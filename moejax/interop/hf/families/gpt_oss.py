"""gpt-oss (OpenAI 2025), also in MXFP4."""

from moejax.interop.hf.attention_bias import BIASES, attention_bias
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    NORMS,
    OUTER,
    experts_per_token,
)
from moejax.interop.hf.shared.windows import Windows, on_every_other_layer
from moejax.interop.hf.tensors import Tensor

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *DECODER,
        *experts_per_token(Always("moe.renormalize", True), "num_local_experts", "num_experts"),
        Key("intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=150_000.0),
        attention_bias(default=True),
        Windows(
            on_every_other_layer,
            width=128,
            max_window_layers=10_000,
            chooses_layers=True,
        ),
        Fixed("swiglu_alpha", 1.702),
        Ignored("initial_context_length"),  # rope_scaling says the same
        Key("swiglu_limit", "moe.activation_limit", default=7.0),
        Always("attention.sinks", True),
        Always("moe.score", "softmax_after"),
        Always("moe.activation", "clamped_swiglu"),
        Always("moe.expert_bias", True),
        Always("moe.router_bias", True),
    ),
    outer=OUTER,
    layer=(
        *NORMS,
        *ATTENTION,
        *BIASES,
        Tensor("self_attn.sinks", "H", "mixer/sinks", "H"),
    ),
    dense=(),
    moe=(
        Tensor("mlp.router.weight", "E D", "ffn/router/kernel", "D E"),
        Tensor("mlp.router.bias", "E", "ffn/router/bias", "E"),
        # Gate and up projections alternate.
        Tensor("mlp.experts.gate_up_proj", "E D (F P)", "ffn/experts/gate_up", "E D P F"),
        Tensor("mlp.experts.gate_up_proj_bias", "E (F P)", "ffn/experts/gate_up_bias", "E P F"),
        Tensor("mlp.experts.down_proj", "E F D", "ffn/experts/down", "E F D"),
        Tensor("mlp.experts.down_proj_bias", "E D", "ffn/experts/down_bias", "E D"),
    ),
)
