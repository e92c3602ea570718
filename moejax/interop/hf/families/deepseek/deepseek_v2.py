"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024)."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import (
    BASE,
    MLP_EXPERTS,
    MLP_ROUTER,
    NORMS,
    OUTER,
    feed_forward,
)
from moejax.interop.hf.shared.latent_attention import LATENT_ATTENTION, LATENT_TENSORS


def _read_groups(published: Mapping[str, Any]) -> Leaves:
    """Returns the groups of experts, which only one of the methods heeds."""
    method = first_of(published, ("topk_method",), "greedy")
    if method == "greedy":
        return {"moe.num_groups": 1, "moe.top_k_groups": 1}
    if method != "group_limited_greedy":
        raise HfError(
            f"topk_method={method} is not implemented; greedy and group_limited_greedy are"
        )
    return {
        "moe.num_groups": first_of(published, ("n_group",)),
        "moe.top_k_groups": first_of(published, ("topk_group",)),
        "moe.group_score": "max",
    }


def _write_groups(leaves: Leaves) -> dict[str, Any]:
    has_groups = leaves["moe.num_groups"] > 1
    return {
        "topk_method": "group_limited_greedy" if has_groups else "greedy",
        "n_group": leaves["moe.num_groups"],
        "topk_group": leaves["moe.top_k_groups"],
    }


def _read_bias(published: Mapping[str, Any]) -> Leaves:
    has_bias = first_of(published, ("mlp_bias",), False)
    return {"model.ffn_bias": has_bias, "moe.shared_bias": has_bias}


def _write_bias(leaves: Leaves) -> dict[str, Any]:
    return {"mlp_bias": leaves["moe.shared_bias"]}


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=(
        *BASE,
        *LATENT_ATTENTION,
        Always("attention.rope_interleaved", True),
        Mapped(("topk_method", "n_group", "topk_group"), _read_groups, _write_groups),
        Key("n_routed_experts", "moe.num_experts", aliases=("num_local_experts", "num_experts")),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("n_shared_experts", "moe.num_shared_experts"),
        Key("intermediate_size", "model.d_ff"),
        Key("first_k_dense_replace", "moe.first_dense", default=0),
        Key("routed_scaling_factor", "moe.route_scale", default=1.0),
        Fixed("scoring_func", "softmax"),
        Fixed("moe_layer_freq", 1),
        Mapped(("mlp_bias",), _read_bias, _write_bias),
        # The reference does not renormalise, whatever norm_topk_prob says.
        Ignored("norm_topk_prob", "aux_loss_alpha", "ep_size", "seq_aux"),
        Ignored("head_dim", "qk_head_dim"),
        Always("moe.router", "softmax_topk"),
        Always("moe.renormalize", False),
        Always("moe.balance_weight", 0.0),
        Always("moe.z_weight", 0.0),
    ),
    outer=OUTER,
    layer=(*NORMS, *LATENT_TENSORS),
    dense=feed_forward("mlp", "ffn"),
    moe=(*MLP_ROUTER, *MLP_EXPERTS, *feed_forward("mlp.shared_experts", "ffn/shared")),
)
