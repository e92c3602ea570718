"""Qwen1.5-MoE and Qwen2-MoE."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import (
    ATTENTION,
    DECODER,
    MLP_EXPERTS,
    MLP_ROUTER,
    NORMS,
    OUTER,
    QKV_BIAS,
    SOFTMAX_ROUTER,
    feed_forward,
)
from moejax.interop.hf.shared.sparse_layers import SPARSE_STEPS
from moejax.interop.hf.shared.windows import Windows, on_every_other_layer
from moejax.interop.hf.tensors import Tensor

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *DECODER,
        Windows(
            on_every_other_layer,
            width=4096,
            has_switch=True,
            max_window_layers=28,
            chooses_layers=True,
        ),
        *SOFTMAX_ROUTER,
        SPARSE_STEPS,
        Key("intermediate_size", "model.d_ff"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("shared_expert_intermediate_size", "moe.d_shared"),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Key("qkv_bias", "attention.qkv_bias", default=True),
        Always("moe.num_shared_experts", 1),
        Always("moe.shared_combine", "gated"),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *QKV_BIAS),
    dense=feed_forward("mlp", "ffn"),
    moe=(
        *MLP_ROUTER,
        *MLP_EXPERTS,
        *feed_forward("mlp.shared_expert", "ffn/shared"),
        Tensor("mlp.shared_expert_gate.weight", "O D", "ffn/shared_gate", "D O"),
    ),
)
