"""DeepSeek-V3 and R1 (DeepSeek-AI 2024), Moonlight and Kimi K2, with weights of 16 or 32 bits."""

import math
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import BASE, MLP_EXPERTS, MLP_ROUTER, NORMS, OUTER, feed_forward
from moejax.interop.hf.rope import write_scaling
from moejax.interop.hf.tensors import Tensor


def _read_score_factor(published: Mapping[str, Any]) -> Leaves:
    """Returns the factor on scores, the square of what YaRN gives queries and keys elsewhere."""
    scaling = published.get("rope_scaling") or {}
    mscale = scaling.get("mscale_all_dim")
    if not mscale:
        return {"attention.score_factor": 1.0}
    magnitude = 0.1 * mscale * math.log(first_of(scaling, ("factor",))) + 1
    return {"attention.score_factor": magnitude**2}


def _write_score_factor(leaves: Leaves) -> dict[str, Any]:
    written = write_scaling(leaves)
    factor = leaves["attention.score_factor"]
    if factor == 1 or written["rope_scaling"] is None:
        return written
    mscale = (math.sqrt(factor) - 1) / (0.1 * math.log(leaves["attention.rope_factor"]))
    written["rope_scaling"]["mscale_all_dim"] = round(mscale, 6)
    return written


SCORE_FACTOR = Mapped(("rope_scaling",), _read_score_factor, _write_score_factor)


def _check_heads(published: Mapping[str, Any]) -> Leaves:
    """Raises `HfError` where heads would share keys."""
    heads = first_of(published, ("num_attention_heads",))
    kv_heads = first_of(published, ("num_key_value_heads",), heads)
    if kv_heads != heads:
        raise HfError(
            f"num_key_value_heads={kv_heads} must be num_attention_heads={heads}: every head has "
            "keys of its own in latent attention"
        )
    return {"attention.num_heads": heads}


def _write_heads(leaves: Leaves) -> dict[str, Any]:
    heads = leaves["attention.num_heads"]
    return {"num_attention_heads": heads, "num_key_value_heads": heads}


EQUAL_HEADS = Mapped(("num_attention_heads", "num_key_value_heads"), _check_heads, _write_heads)


def _is_of_further_layers(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a layer after the last, which predicts further tokens in training."""
    first = first_of(published, ("num_hidden_layers",))
    num_further = first_of(published, ("num_nextn_predict_layers",), 0)
    prefixes = [f"model.layers.{layer}." for layer in range(first, first + num_further)]
    return name.startswith(tuple(prefixes))


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *BASE,
        EQUAL_HEADS,
        SCORE_FACTOR,
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Key("rope_interleave", "attention.rope_interleaved", default=True),
        Key("q_lora_rank", "attention.d_query_latent", default=0),
        Key("kv_lora_rank", "attention.d_kv_latent"),
        Key("qk_nope_head_dim", "attention.d_nope"),
        Key("qk_rope_head_dim", "attention.d_rope"),
        Key("v_head_dim", "attention.d_value"),
        Always("attention.kind", "latent"),
        Fixed("attention_bias", False),
        Key("n_routed_experts", "moe.num_experts", aliases=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("n_shared_experts", "moe.num_shared_experts"),
        Key("intermediate_size", "model.d_ff"),
        Key("first_k_dense_replace", "moe.first_dense"),
        Key("n_group", "moe.num_groups"),
        Key("topk_group", "moe.top_k_groups"),
        Key("norm_topk_prob", "moe.renormalize"),
        Key("routed_scaling_factor", "moe.route_scale"),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        Fixed("moe_layer_freq", 1),
        Ignored("aux_loss_alpha", "ep_size", "head_dim", "num_nextn_predict_layers"),
        Ignored("qk_head_dim", "seq_aux"),
        Always("moe.router", "sigmoid_topk"),
        Always("moe.score", "sigmoid"),
        Always("moe.selection_bias", True),
        Always("moe.balance_weight", 0.0),
        Always("moe.z_weight", 0.0),
    ),
    outer=OUTER,
    layer=(
        *NORMS,
        Tensor(
            "self_attn.q_proj.weight",
            "(H A) D",
            "mixer/query",
            "D H A",
            only_without="mixer/query_down",
        ),
        Tensor(
            "self_attn.q_a_proj.weight",
            "C D",
            "mixer/query_down",
            "D C",
            only_with="mixer/query_down",
        ),
        Tensor(
            "self_attn.q_a_layernorm.weight",
            "C",
            "mixer/query_norm/scale",
            "C",
            only_with="mixer/query_down",
        ),
        Tensor(
            "self_attn.q_b_proj.weight",
            "(H A) C",
            "mixer/query",
            "C H A",
            only_with="mixer/query_down",
        ),
        Tensor("self_attn.kv_a_proj_with_mqa.weight", "X D", "mixer/kv_down", "D X"),
        Tensor("self_attn.kv_a_layernorm.weight", "C", "mixer/kv_norm/scale", "C"),
        Tensor("self_attn.kv_b_proj.weight", "(H X) C", "mixer/kv_up", "C H X"),
        Tensor("self_attn.o_proj.weight", "D (H A)", "mixer/out", "H A D"),
    ),
    dense=feed_forward("mlp", "ffn"),
    moe=(
        *MLP_ROUTER,
        Tensor("mlp.gate.e_score_correction_bias", "E", "ffn/selection_bias", "E"),
        *MLP_EXPERTS,
        *feed_forward("mlp.shared_experts", "ffn/shared"),
    ),
    is_ignored=_is_of_further_layers,
)
