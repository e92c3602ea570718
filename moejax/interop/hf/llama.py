"""What most families share with Llama: names of tensors, and keys of `config.json`."""

import functools
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.keys import Always, Entry, Fixed, Key, Leaves, Mapped, first_of
from moejax.interop.hf.rope import ROPE_SCALING
from moejax.interop.hf.tensors import Tensor, only_with


def head_width(published: Mapping[str, Any], default: int = 0) -> int:
    """Returns the width of a head.

    Args:
      published: the content of `config.json`.
      default: where it is not given; 0: what the width of the model leaves for each head.
    """
    width = first_of(published, ("hidden_size",))
    heads = first_of(published, ("num_attention_heads",))
    return first_of(published, ("head_dim",), default or width // heads)


def _read_heads(default: int, published: Mapping[str, Any]) -> Leaves:
    width = first_of(published, ("hidden_size",))
    heads = first_of(published, ("num_attention_heads",))
    kv_heads = first_of(published, ("num_key_value_heads",), heads)
    head = head_width(published, default)
    is_derived = head * heads == width
    return {
        "attention.num_heads": heads,
        "attention.num_kv_heads": kv_heads,
        "attention.head_dim": 0 if is_derived else head,
    }


def _write_heads(leaves: Leaves) -> dict[str, Any]:
    heads = leaves["attention.num_heads"]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": leaves["attention.num_kv_heads"],
        "head_dim": leaves["attention.head_dim"] or leaves["model.d_model"] // heads,
    }


def base(*, tied_embeddings: bool = False) -> tuple[Entry, ...]:
    """Returns the keys of a decoder with SwiGLU, but for its heads and their positions.

    Args:
      tied_embeddings: whether they are where files do not say so.
    """
    return (
        Key("vocab_size", "model.vocab_size"),
        Key("hidden_size", "model.d_model"),
        Key("num_hidden_layers", "model.num_layers"),
        Key("rms_norm_eps", "model.norm_epsilon"),
        Key("tie_word_embeddings", "model.tied_embeddings", default=tied_embeddings),
        Fixed("hidden_act", "silu"),
        Always("model.embedding_multiplier", 1.0),
    )


BASE = base()
"""Those of most families, whose embeddings are not tied."""


def heads(default: int = 0) -> Entry:
    """Returns the keys of heads; `default` is their width where files lack it, see `head_width`."""
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return Mapped(keys, functools.partial(_read_heads, default), _write_heads)


def decoder(head_dim: int = 0) -> tuple[Entry, ...]:
    """Returns the keys of a decoder with grouped-query attention and SwiGLU.

    Args:
      head_dim: where files lack it; 0: what the width of the model leaves for each head.
    """
    return (*BASE, heads(head_dim), ROPE_SCALING)


DECODER = decoder()
"""Keys of a decoder whose heads share the width of the model."""


def experts_per_token(renormalize: Entry, num_experts: str, *aliases: str) -> tuple[Entry, ...]:
    """Returns the keys of a softmax router.

    Args:
      renormalize: whether the weights of a token's experts are made to add up to 1.
      num_experts: the key of their number.
      aliases: other spellings of it.
    """
    return (
        Key(num_experts, "moe.num_experts", aliases=aliases),
        Key("num_experts_per_tok", "moe.top_k", aliases=("experts_per_token",)),
        Key("router_aux_loss_coef", "moe.balance_weight", default=0.001),
        renormalize,
        Always("moe.router", "softmax_topk"),
        Always("moe.z_weight", 0.0),
    )


SOFTMAX_ROUTER = experts_per_token(
    Key("norm_topk_prob", "moe.renormalize", default=False), "num_experts", "num_local_experts"
)
"""Keys of a softmax router that says whether it renormalises."""

OUTER = (
    Tensor("model.embed_tokens.weight", "V D", "embedding", "V D"),
    Tensor("model.norm.weight", "D", "final_norm/scale", "D"),
    Tensor("lm_head.weight", "V D", "unembedding", "V D", only_with="unembedding"),
)
"""The embedding, the last norm, and the head, which a model with tied embeddings lacks."""

NORMS = (
    Tensor("input_layernorm.weight", "D", "mixer_norm/scale", "D"),
    Tensor("post_attention_layernorm.weight", "D", "ffn_norm/scale", "D"),
)

ATTENTION = (
    Tensor("self_attn.q_proj.weight", "(H A) D", "mixer/query", "D H A"),
    Tensor("self_attn.k_proj.weight", "(G A) D", "mixer/key", "D G A"),
    Tensor("self_attn.v_proj.weight", "(G A) D", "mixer/value", "D G A"),
    Tensor("self_attn.o_proj.weight", "D (H A)", "mixer/out", "H A D"),
)

QKV_BIAS = (
    Tensor("self_attn.q_proj.bias", "(H A)", "mixer/query_bias", "H A", "mixer/query_bias"),
    Tensor("self_attn.k_proj.bias", "(G A)", "mixer/key_bias", "G A", "mixer/key_bias"),
    Tensor("self_attn.v_proj.bias", "(G A)", "mixer/value_bias", "G A", "mixer/value_bias"),
)
"""Biases, which a model without them lacks."""

QK_NORM = (
    Tensor("self_attn.q_norm.weight", "A", "mixer/query_norm/scale", "A"),
    Tensor("self_attn.k_norm.weight", "A", "mixer/key_norm/scale", "A"),
)

WHOLE_QK_NORM = (
    Tensor("self_attn.q_norm.weight", "X", "mixer/query_norm/scale", "X"),
    Tensor("self_attn.k_norm.weight", "X", "mixer/key_norm/scale", "X"),
)
"""Norms of all heads as one vector."""


def feed_forward(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """Returns the tensors of a SwiGLU network by the names of Llama, if the model has it.

    Args:
      theirs: its name, such as `mlp`.
      ours: its path, such as `ffn/shared`.
    """
    weights = (
        Tensor(f"{theirs}.gate_proj.weight", "F D", f"{ours}/gate_up", "D 0 F"),
        Tensor(f"{theirs}.up_proj.weight", "F D", f"{ours}/gate_up", "D 1 F"),
        Tensor(f"{theirs}.down_proj.weight", "D F", f"{ours}/down", "F D"),
    )
    biases = (
        Tensor(f"{theirs}.gate_proj.bias", "F", f"{ours}/gate_up_bias", "0 F"),
        Tensor(f"{theirs}.up_proj.bias", "F", f"{ours}/gate_up_bias", "1 F"),
        Tensor(f"{theirs}.down_proj.bias", "D", f"{ours}/down_bias", "D"),
    )
    return (*only_with(f"{ours}/down", weights), *only_with(f"{ours}/down_bias", biases))


def experts(theirs: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """Returns the tensors of experts that have files' tensors of their own.

    Args:
      theirs: the name of an expert, such as `mlp.experts.{expert}`.
      gate: of its projections, such as `gate_proj`.
      up: likewise.
      down: likewise.
    """
    gate_up, rows = "ffn/experts/gate_up", "ffn/experts/down"
    return (
        Tensor(f"{theirs}.{gate}.weight", "F D", gate_up, "{expert} D 0 F"),
        Tensor(f"{theirs}.{up}.weight", "F D", gate_up, "{expert} D 1 F"),
        Tensor(f"{theirs}.{down}.weight", "D F", rows, "{expert} F D"),
    )


MLP_EXPERTS = experts("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj")
MLP_ROUTER = (Tensor("mlp.gate.weight", "E D", "ffn/router/kernel", "D E"),)
