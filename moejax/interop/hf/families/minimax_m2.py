"""MiniMax-M2 (MiniMax 2025), without the modules that predict further tokens."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped
from moejax.interop.hf.llama import (
    ATTENTION,
    NORMS,
    OUTER,
    WHOLE_QK_NORM,
    decoder,
    experts,
)
from moejax.interop.hf.shared.partial_rope import partial_rope
from moejax.interop.hf.tensors import Tensor

HEAD_DIM = 128
"""Where files lack it."""


def _refuse_other_attention(published: Mapping[str, Any]) -> Leaves:
    """Raises `HfError` for layers without softmax attention."""
    kinds = published.get("attn_type_list") or []
    if set(kinds) - {1}:
        raise HfError(f"attn_type_list={kinds} is not implemented; only layers of type 1 are")
    return {}


def _write_attention(leaves: Leaves) -> dict[str, Any]:
    return {"attn_type_list": [1] * leaves["model.num_layers"]}


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    keys=(
        *decoder(HEAD_DIM),
        partial_rope("rotary_dim", head_dim=HEAD_DIM),
        Key("rope_theta", "attention.rope_theta", default=5e6),
        Always("attention.qk_norm", "whole"),
        Fixed("use_qk_norm", True),
        Fixed("qk_norm_type", "per_layer"),
        Mapped(("attn_type_list",), _refuse_other_attention, _write_attention),
        Key("num_local_experts", "moe.num_experts", aliases=("num_experts",)),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("intermediate_size", "moe.d_expert"),
        Key("router_aux_loss_coef", "moe.balance_weight", default=0.001),
        Fixed("scoring_func", "sigmoid"),
        Fixed("use_routing_bias", True),
        Fixed("shared_intermediate_size", 0),
        Fixed("router_jitter_noise", 0.0),
        Fixed("layernorm_full_attention_beta", 1.0),
        Fixed("layernorm_mlp_beta", 1.0),
        # Of layers that no model has, and of the modules that are left out.
        Ignored("layernorm_linear_attention_beta", "mlp_intermediate_size", "shared_moe_mode"),
        Ignored("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
        Always("moe.router", "sigmoid_topk"),
        Always("moe.score", "sigmoid"),
        Always("moe.selection_bias", True),
        Always("moe.renormalize", True),
        Always("moe.z_weight", 0.0),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *WHOLE_QK_NORM),
    dense=(),
    moe=(
        Tensor("block_sparse_moe.gate.weight", "E D", "ffn/router/kernel", "D E"),
        Tensor("block_sparse_moe.e_score_correction_bias", "E", "ffn/selection_bias", "E"),
        *experts("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
    ),
)
