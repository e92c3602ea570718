"""ERNIE 4.5 (Baidu 2025), its models of text with experts."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.attention_bias import BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import (
    ATTENTION,
    MLP_EXPERTS,
    MLP_ROUTER,
    NORMS,
    OUTER,
    base,
    feed_forward,
    heads,
)
from moejax.interop.hf.rope import ROPE_SCALING
from moejax.interop.hf.shared.sparse_layers import layers_with_experts
from moejax.interop.hf.tensors import Tensor


def _have_experts(num_layers: int, first: int, last: int, interval: int) -> list[bool]:
    """Returns which layers have experts: every so many, from the first to the last."""
    have = []
    for layer in range(num_layers):
        is_at_interval = (layer + 1) % interval == 0
        have.append(is_at_interval and first <= layer <= last)
    return have


def _read_layers(published: Mapping[str, Any]) -> Leaves:
    num_layers = first_of(published, ("num_hidden_layers",))
    first = first_of(published, ("moe_layer_start_index",), 1)
    last = first_of(published, ("moe_layer_end_index",), -1)
    interval = first_of(published, ("moe_layer_interval",), 1)
    if last == -1:
        last = num_layers - 1
    return layers_with_experts(_have_experts(num_layers, first, last, interval))


def _write_layers(leaves: Leaves) -> dict[str, Any]:
    """Returns the keys of the layers, by the first interval that fits; 1 if none does."""
    num_layers = leaves["model.num_layers"]
    have = [layer not in leaves["dense_layers"] for layer in range(num_layers)]
    first = have.index(True)
    last = num_layers - 1 - have[::-1].index(True)
    fitting = [
        interval
        for interval in range(1, num_layers + 1)
        if _have_experts(num_layers, first, last, interval) == have
    ]
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": (*fitting, 1)[0],
    }


LAYERS = Mapped(
    ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    _read_layers,
    _write_layers,
)


def _read_bias(published: Mapping[str, Any]) -> Leaves:
    """Returns the biases that one key turns on: all but those of routed experts."""
    has_bias = first_of(published, ("use_bias",), False)
    has_shared = first_of(published, ("moe_num_shared_experts",), 2) > 0
    return {
        "attention.qkv_bias": has_bias,
        "attention.out_bias": has_bias,
        "model.ffn_bias": has_bias,
        "model.logits_bias": has_bias,
        "moe.shared_bias": has_bias and has_shared,
    }


def _write_bias(leaves: Leaves) -> dict[str, Any]:
    return {"use_bias": leaves["attention.qkv_bias"]}


def _is_of_further_tokens(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor is of what predicts further tokens in training."""
    del published
    return name.startswith("model.mtp_")


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    keys=(
        *base(tied_embeddings=True),
        heads(),
        ROPE_SCALING,
        LAYERS,
        Key("rope_theta", "attention.rope_theta", default=5e5),
        Always("attention.rope_interleaved", True),
        Mapped(("use_bias",), _read_bias, _write_bias),
        Key("intermediate_size", "model.d_ff"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("moe_num_experts", "moe.num_experts", aliases=("num_experts",)),
        Key("moe_k", "moe.top_k", aliases=("num_experts_per_tok",)),
        Key("moe_num_shared_experts", "moe.num_shared_experts", default=2),
        Key("moe_norm_min", "moe.renormalize_floor", default=1e-12),
        Key("router_aux_loss_coef", "moe.balance_weight", default=0.001),
        Fixed("moe_use_aux_free", True),
        Fixed("moe_gate", "topk"),
        Fixed("use_rmsnorm", True),
        Ignored("moe_capacity", "num_nextn_predict_layers"),
        Always("moe.router", "softmax_topk"),
        Always("moe.selection_bias", True),
        Always("moe.renormalize", True),
        Always("moe.z_weight", 0.0),
    ),
    outer=(*OUTER, Tensor("lm_head.bias", "V", "logits_bias", "V", only_with="logits_bias")),
    layer=(*NORMS, *ATTENTION, *BIASES),
    dense=feed_forward("mlp", "ffn"),
    moe=(
        *MLP_ROUTER,
        Tensor("mlp.moe_statics.e_score_correction_bias", "1 E", "ffn/selection_bias", "E"),
        *MLP_EXPERTS,
        *feed_forward("mlp.shared_experts", "ffn/shared"),
    ),
    is_ignored=_is_of_further_tokens,
)
