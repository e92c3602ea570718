"""Hunyuan-A13B (Tencent 2025)."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import (
    ATTENTION,
    BASE,
    MLP_EXPERTS,
    NORMS,
    OUTER,
    feed_forward,
    head_width,
    heads,
)
from moejax.interop.hf.rope import kind_of, read_scaling, write_scaling
from moejax.interop.hf.tensors import Tensor


def _read_rope(published: Mapping[str, Any]) -> Leaves:
    """Returns the leaves of positions; `alpha` makes frequencies as a larger base does."""
    theta = float(first_of(published, ("rope_theta",), 1e4))
    scaling = published.get("rope_scaling") or {}
    alpha = scaling.get("alpha")
    if kind_of(scaling) == "dynamic" and alpha:
        # Nothing else of such a rope_scaling is read.
        head = head_width(published)
        theta *= alpha ** (head / (head - 2))
        return {"attention.rope_scaling": "none", "attention.rope_theta": theta}
    return {"attention.rope_theta": theta} | read_scaling(published)


def _write_rope(leaves: Leaves) -> dict[str, Any]:
    return {"rope_theta": leaves["attention.rope_theta"]} | write_scaling(leaves)


def _read_top_k(published: Mapping[str, Any]) -> Leaves:
    """Returns the experts per token, which may be listed by layer."""
    listed = _by_layer(published, ("moe_topk", "num_experts_per_tok"))
    others = []
    for layer, top_k in enumerate(listed):
        if top_k != listed[0]:
            others.append(f"{layer}: top_k={top_k}")
    return {"moe.top_k": listed[0], "moe.per_layer": "; ".join(others)}


def _write_top_k(leaves: Leaves) -> dict[str, Any]:
    listed = list(leaves["top_k_by_layer"])
    is_alike = len(set(listed)) == 1
    return {"moe_topk": listed[0] if is_alike else listed}


def _read_shared(published: Mapping[str, Any]) -> Leaves:
    """Refuses other networks than one shared expert of the width of the others in each layer."""
    width = first_of(published, ("intermediate_size",))
    expected = {"num_shared_expert": 1, "moe_intermediate_size": width}
    for key, value in expected.items():
        listed = set(_by_layer(published, (key,), value))
        if listed != {value}:
            raise HfError(f"{key}={published[key]} is not implemented; only {value} is")
    return {"moe.d_expert": width, "moe.num_shared_experts": 1}


def _write_shared(leaves: Leaves) -> dict[str, Any]:
    width = leaves["moe.d_expert"]
    return {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_shared_expert": 1,
    }


def _by_layer(published: Mapping[str, Any], keys: tuple[str, ...], default: int = 1) -> list[int]:
    """Returns the value of each layer, where a key has one for all or a list.

    Raises:
      HfError: a list of another length, or no layers.
    """
    num_layers = first_of(published, ("num_hidden_layers",))
    if num_layers < 1:
        raise HfError(f"num_hidden_layers={num_layers} must be at least 1")
    value = first_of(published, keys, default)
    if not isinstance(value, list):
        return [value] * num_layers
    if len(value) != num_layers:
        raise HfError(f"{keys[0]}={value} must have a number for each of {num_layers} layers")
    return value


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    keys=(
        *BASE,
        heads(),
        Mapped(("rope_theta", "rope_scaling"), _read_rope, _write_rope),
        ATTENTION_BIAS,
        Always("attention.qk_norm", "head"),
        Always("attention.qk_norm_after_rope", True),
        Fixed("use_qk_norm", True),
        Key("num_experts", "moe.num_experts", aliases=("num_local_experts",)),
        Mapped(("moe_topk", "num_experts_per_tok"), _read_top_k, _write_top_k),
        Mapped(
            ("intermediate_size", "moe_intermediate_size", "num_shared_expert"),
            _read_shared,
            _write_shared,
        ),
        Fixed("use_mixed_mlp_moe", True),
        Fixed("mlp_bias", False),
        Fixed("use_cla", False),
        Fixed("use_mla", False),
        Fixed("norm_type", "rms"),
        Fixed("group_limited_greedy", False),
        Fixed("position_embedding_xdrope", False),
        Fixed("moe_layer_num_skipped", 0),
        Ignored("attention_head_dim", "cla_share_factor", "eod_token_id", "sep_token_id"),
        Ignored("moe_drop_tokens", "moe_random_routing_dropped_token", "norm_topk_prob"),
        Ignored("n_group", "topk_group", "routed_scaling_factor"),  # of groups, which are off
        Always("moe.router", "softmax_topk"),
        Always("moe.renormalize", True),
        Always("moe.balance_weight", 0.0),
        Always("moe.z_weight", 0.0),
    ),
    outer=OUTER,
    layer=(
        *NORMS,
        *ATTENTION,
        *BIASES,
        Tensor("self_attn.query_layernorm.weight", "A", "mixer/query_norm/scale", "A"),
        Tensor("self_attn.key_layernorm.weight", "A", "mixer/key_norm/scale", "A"),
    ),
    dense=(),
    moe=(
        Tensor("mlp.gate.wg.weight", "E D", "ffn/router/kernel", "D E"),
        *MLP_EXPERTS,
        *feed_forward("mlp.shared_mlp", "ffn/shared"),
    ),
)
