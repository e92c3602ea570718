"""The router of DeepSeek-V3, which later families have, too: its keys and its tensors."""

from typing import Any

from moejax.interop.hf.keys import REQUIRED, Always, Entry, Fixed, Key
from moejax.interop.hf.llama import MLP_EXPERTS, MLP_ROUTER, feed_forward
from moejax.interop.hf.tensors import Tensor


def sigmoid_router(defaults: dict[str, Any] | None = None) -> tuple[Entry, ...]:
    """Returns the keys of layers with experts after dense ones.

    Args:
      defaults: what the reference takes where a key is absent, by key.
    """
    given = defaults or {}

    def key(name: str, leaf: str) -> Key:
        return Key(name, leaf, default=given.get(name, REQUIRED))

    return (
        Key("n_routed_experts", "moe.num_experts", aliases=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("intermediate_size", "model.d_ff"),
        key("n_shared_experts", "moe.num_shared_experts"),
        key("first_k_dense_replace", "moe.first_dense"),
        key("n_group", "moe.num_groups"),
        key("topk_group", "moe.top_k_groups"),
        key("norm_topk_prob", "moe.renormalize"),
        key("routed_scaling_factor", "moe.route_scale"),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        Fixed("moe_layer_freq", 1),
        Always("moe.router", "sigmoid_topk"),
        Always("moe.score", "sigmoid"),
        Always("moe.selection_bias", True),
        Always("moe.balance_weight", 0.0),
        Always("moe.z_weight", 0.0),
    )


SIGMOID_MOE = (
    *MLP_ROUTER,
    Tensor("mlp.gate.e_score_correction_bias", "E", "ffn/selection_bias", "E"),
    *MLP_EXPERTS,
    *feed_forward("mlp.shared_experts", "ffn/shared"),
)
"""Tensors of a layer with experts."""
