"""JetMoE (Shen et al. 2024), whose attention has experts, too."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Key, Leaves, Mapped, first_of, without
from moejax.interop.hf.llama import BASE, NORMS, OUTER, experts_per_token
from moejax.interop.hf.rope import ROPE_SCALING
from moejax.interop.hf.shared.granite import fused_feed_forward
from moejax.interop.hf.tensors import Tensor

LAYER_EPSILON = 1e-6
"""Of the norms of layers, whatever `rms_norm_eps` is, which is that of the last norm."""


def _read_epsilon(published: Mapping[str, Any]) -> Leaves:
    last = first_of(published, ("rms_norm_eps",), LAYER_EPSILON)
    return {
        "model.norm_epsilon": LAYER_EPSILON,
        "model.final_norm_epsilon": 0.0 if last == LAYER_EPSILON else last,
    }


def _write_epsilon(leaves: Leaves) -> dict[str, Any]:
    last = leaves["model.final_norm_epsilon"] or leaves["model.norm_epsilon"]
    return {"rms_norm_eps": last}


def _read_heads(published: Mapping[str, Any]) -> Leaves:
    width = first_of(published, ("hidden_size",))
    kv_heads = first_of(published, ("num_key_value_heads",), 16)
    top_k = first_of(published, ("num_experts_per_tok",), 2)
    head = first_of(published, ("kv_channels", "head_dim"), 128)
    heads = kv_heads * top_k
    given = first_of(published, ("num_attention_heads",), heads)
    if given != heads:
        raise HfError(
            f"num_attention_heads={given} must be {heads}, num_key_value_heads={kv_heads} times "
            f"num_experts_per_tok={top_k}"
        )
    return {
        "attention.num_heads": heads,
        "attention.num_kv_heads": kv_heads,
        "attention.head_dim": 0 if head * heads == width else head,
        "attention.num_query_experts": first_of(published, ("num_local_experts",), 8),
        "attention.top_k_query_experts": top_k,
    }


def _write_heads(leaves: Leaves) -> dict[str, Any]:
    heads = leaves["attention.num_heads"]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": leaves["attention.num_kv_heads"],
        "kv_channels": leaves["attention.head_dim"] or leaves["model.d_model"] // heads,
    }


HEADS = ("num_attention_heads", "num_key_value_heads", "kv_channels", "head_dim")

FAMILY = Family(
    model_type="jetmoe",
    architecture="JetMoeForCausalLM",
    keys=(
        *without(BASE, "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
        ROPE_SCALING,
        *without(
            experts_per_token(Always("moe.renormalize", True), "num_local_experts"),
            "router_aux_loss_coef",
        ),
        Mapped(("rms_norm_eps",), _read_epsilon, _write_epsilon),
        Mapped(HEADS, _read_heads, _write_heads),
        Key("tie_word_embeddings", "model.tied_embeddings", default=True),
        Key("intermediate_size", "moe.d_expert"),
        Key("aux_loss_coef", "moe.balance_weight", default=0.01),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Fixed("activation_function", "silu"),
        Always("attention.kind", "routed"),
        Always("attention.out_bias", True),
        # The reference records the routers of attention twice.
        Always("attention.router_loss_factor", 2.0),
        Always("moe.output_bias", True),
    ),
    outer=OUTER,
    layer=(
        *NORMS,
        Tensor("self_attention.kv_proj.weight", "(P G A) D", "mixer/key_value", "D P G A"),
        Tensor("self_attention.experts.input_linear.weight", "E (G A) D", "mixer/query", "E D G A"),
        Tensor("self_attention.experts.output_linear.weight", "E D (G A)", "mixer/out", "E G A D"),
        Tensor("self_attention.experts.bias", "D", "mixer/out_bias", "D"),
        Tensor("self_attention.experts.router.layer.weight", "E D", "mixer/router/kernel", "D E"),
    ),
    dense=(),
    moe=(
        Tensor("mlp.router.layer.weight", "E D", "ffn/router/kernel", "D E"),
        *fused_feed_forward("mlp", "ffn/experts", "E"),
        Tensor("mlp.bias", "D", "ffn/output_bias", "D"),
    ),
)
