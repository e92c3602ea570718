"""DBRX (Databricks 2024)."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Ignored, Key, Leaves, Mapped, first_of
from moejax.interop.hf.rope import ROPE_SCALING
from moejax.interop.hf.tensors import Tensor

WITHOUT_MEANING = {
    "_name_or_path",
    "architectures",
    "attn_pdrop",  # of training alone
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "moe_jitter_eps",  # of training alone
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}
"""Keys of the two parts of the file that say nothing of how a text is evaluated."""


def _part(published: Mapping[str, Any], name: str, known: set[str]) -> Mapping[str, Any]:
    """Returns a part of the file; raises `HfError` for a key of it that is not known."""
    part = first_of(published, (name,))
    for key, value in part.items():
        if key not in known | WITHOUT_MEANING and value is not None:
            raise HfError(f"{name} has {key}={value!r}, which is not implemented")
    return part


def _read_attention(published: Mapping[str, Any]) -> Leaves:
    part = _part(published, "attn_config", {"clip_qkv", "kv_n_heads", "rope_theta"})
    kv_heads = first_of(part, ("kv_n_heads",), 1)
    given = first_of(published, ("num_key_value_heads",), kv_heads)
    if given != kv_heads:
        raise HfError(f"num_key_value_heads={given} must be attn_config.kv_n_heads={kv_heads}")
    theta = first_of(published, ("rope_theta",), first_of(part, ("rope_theta",), 1e4))
    return {
        "attention.num_kv_heads": kv_heads,
        "attention.clip_qkv": first_of(part, ("clip_qkv",), 0.0),
        "attention.rope_theta": theta,
    }


def _write_attention(leaves: Leaves) -> dict[str, Any]:
    kv_heads, theta = leaves["attention.num_kv_heads"], leaves["attention.rope_theta"]
    part = {
        "clip_qkv": leaves["attention.clip_qkv"] or None,
        "kv_n_heads": kv_heads,
        "rope_theta": theta,
    }
    return {"attn_config": part, "num_key_value_heads": kv_heads, "rope_theta": theta}


EXPERT_KEYS = {
    "ffn_act_fn",
    "ffn_hidden_size",
    "hidden_size",
    "moe_loss_weight",
    "moe_normalize_expert_weights",
    "moe_num_experts",
    "moe_top_k",
}


def _read_experts(published: Mapping[str, Any]) -> Leaves:
    part = _part(published, "ffn_config", EXPERT_KEYS)
    activation = first_of(part, ("ffn_act_fn",), {"name": "silu"})
    if activation != {"name": "silu"}:
        raise HfError(f"ffn_config has ffn_act_fn={activation}, which is not implemented; silu is")
    width = first_of(published, ("d_model", "hidden_size"))
    given = first_of(part, ("hidden_size",), width)
    if given != width:
        raise HfError(f"ffn_config.hidden_size={given} must be d_model={width}")
    norm = part.get("moe_normalize_expert_weights", 1.0)
    return {
        "moe.d_expert": first_of(part, ("ffn_hidden_size",), 3584),
        "moe.num_experts": first_of(part, ("moe_num_experts",), 4),
        "moe.top_k": first_of(part, ("moe_top_k",), 1),
        "moe.balance_weight": first_of(part, ("moe_loss_weight",), 0.01),
        "moe.renormalize": norm is not None,
        "moe.weight_norm": 1.0 if norm is None else norm,
    }


def _write_experts(leaves: Leaves) -> dict[str, Any]:
    norm = leaves["moe.weight_norm"] if leaves["moe.renormalize"] else None
    part = {
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": leaves["moe.d_expert"],
        "hidden_size": leaves["model.d_model"],
        "moe_loss_weight": leaves["moe.balance_weight"],
        "moe_normalize_expert_weights": norm,
        "moe_num_experts": leaves["moe.num_experts"],
        "moe_top_k": leaves["moe.top_k"],
    }
    return {"ffn_config": part}


ATTENTION = "norm_attn_norm.attn"
EXPERTS = "ffn.experts.mlp"

FAMILY = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    keys=(
        Key("vocab_size", "model.vocab_size"),
        Key("d_model", "model.d_model", aliases=("hidden_size",)),
        Key("n_layers", "model.num_layers", aliases=("num_hidden_layers",)),
        Key("n_heads", "attention.num_heads", aliases=("num_attention_heads",)),
        Key("tie_word_embeddings", "model.tied_embeddings", default=False),
        ROPE_SCALING,
        Mapped(
            ("attn_config", "num_key_value_heads", "rope_theta"), _read_attention, _write_attention
        ),
        Mapped(("ffn_config",), _read_experts, _write_experts),
        # The loss has the weight in ffn_config; dropout is of training alone.
        Ignored("emb_pdrop", "max_seq_len", "resid_pdrop", "router_aux_loss_coef"),
        Always("model.embedding_multiplier", 1.0),
        Always("model.norm", "layer_without_bias"),
        Always("model.norm_epsilon", 1e-5),
        Always("moe.router", "softmax_topk"),
        Always("moe.z_weight", 0.0),
    ),
    outer=(
        Tensor("transformer.wte.weight", "V D", "embedding", "V D"),
        Tensor("transformer.norm_f.weight", "D", "final_norm/scale", "D"),
        Tensor("lm_head.weight", "V D", "unembedding", "V D", only_with="unembedding"),
    ),
    layer=(
        Tensor("norm_attn_norm.norm_1.weight", "D", "mixer_norm/scale", "D"),
        Tensor("norm_attn_norm.norm_2.weight", "D", "ffn_norm/scale", "D"),
        Tensor(f"{ATTENTION}.Wqkv.weight", "(H A) D", "mixer/query", "D H A"),
        Tensor(f"{ATTENTION}.Wqkv.weight", "(G A) D", "mixer/key", "D G A"),
        Tensor(f"{ATTENTION}.Wqkv.weight", "(G A) D", "mixer/value", "D G A"),
        Tensor(f"{ATTENTION}.out_proj.weight", "D (H A)", "mixer/out", "H A D"),
    ),
    dense=(),
    moe=(
        Tensor("ffn.router.layer.weight", "E D", "ffn/router/kernel", "D E"),
        Tensor(f"{EXPERTS}.w1", "(E F) D", "ffn/experts/gate_up", "E D 0 F"),
        Tensor(f"{EXPERTS}.v1", "(E F) D", "ffn/experts/gate_up", "E D 1 F"),
        Tensor(f"{EXPERTS}.w2", "(E F) D", "ffn/experts/down", "E F D"),
    ),
    prefix="transformer.blocks.{layer}.",
)
