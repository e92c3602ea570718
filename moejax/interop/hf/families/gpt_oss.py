"""gpt-oss (OpenAI 2025), with weights in bfloat16 or float32."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    NORMS,
    OUTER,
    QKV_BIAS,
    experts_per_token,
)
from moejax.interop.hf.shared.windows import Windows, on_every_other_layer
from moejax.interop.hf.tensors import Tensor


def _read_bias(published: Mapping[str, Any]) -> Leaves:
    has_bias = first_of(published, ("attention_bias",), True)
    return {"attention.qkv_bias": has_bias, "attention.out_bias": has_bias}


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *DECODER,
        *experts_per_token(Always("moe.renormalize", True), "num_local_experts", "num_experts"),
        Key("intermediate_size", "moe.d_expert"),
        Key("rope_theta", "attention.rope_theta", default=150_000.0),
        Mapped(
            ("attention_bias",),
            _read_bias,
            lambda leaves: {"attention_bias": leaves["attention.qkv_bias"]},
        ),
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
        *QKV_BIAS,
        Tensor("self_attn.o_proj.bias", "D", "mixer/out_bias", "D"),
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
