"""Multi-head latent attention as DeepSeek publishes it: its keys and its tensors."""

import math
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Always, Entry, Key, Leaves, Mapped, first_of
from moejax.interop.hf.rope import ROPE_SCALING, write_scaling
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


def _read_heads(published: Mapping[str, Any]) -> Leaves:
    """Returns the number of heads; raises `HfError` where heads would share keys."""
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


EQUAL_HEADS = Mapped(("num_attention_heads", "num_key_value_heads"), _read_heads, _write_heads)

SCORE_FACTOR = Mapped(("rope_scaling",), _read_score_factor, _write_score_factor)
"""Read next to `ROPE_SCALING`."""


def _read_query_latent(published: Mapping[str, Any]) -> Leaves:
    """Returns the width of the latent vector of queries, which they lack where it is null."""
    return {"attention.d_query_latent": first_of(published, ("q_lora_rank",), 0)}


def _write_query_latent(leaves: Leaves) -> dict[str, Any]:
    return {"q_lora_rank": leaves["attention.d_query_latent"] or None}


def _read_bias(published: Mapping[str, Any]) -> Leaves:
    has_bias = first_of(published, ("attention_bias",), False)
    return {"attention.latent_bias": has_bias, "attention.out_bias": has_bias}


def _write_bias(leaves: Leaves) -> dict[str, Any]:
    return {"attention_bias": leaves["attention.out_bias"]}


LATENT_BIAS = Mapped(("attention_bias",), _read_bias, _write_bias)

LATENT_ATTENTION: tuple[Entry, ...] = (
    EQUAL_HEADS,
    ROPE_SCALING,
    SCORE_FACTOR,
    Key("rope_theta", "attention.rope_theta", default=1e4),
    Mapped(("q_lora_rank",), _read_query_latent, _write_query_latent),
    Key("kv_lora_rank", "attention.d_kv_latent"),
    Key("qk_nope_head_dim", "attention.d_nope"),
    Key("qk_rope_head_dim", "attention.d_rope"),
    Key("v_head_dim", "attention.d_value"),
    Always("attention.kind", "latent"),
    LATENT_BIAS,
)
"""Keys of the reference of DeepSeek."""

LATENT_TENSORS = (
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
    Tensor("self_attn.q_a_proj.bias", "C", "mixer/query_down_bias", "C", "mixer/query_down_bias"),
    Tensor(
        "self_attn.kv_a_proj_with_mqa.bias",
        "X",
        "mixer/kv_down_bias",
        "X",
        only_with="mixer/kv_down_bias",
    ),
    Tensor("self_attn.o_proj.bias", "D", "mixer/out_bias", "D", only_with="mixer/out_bias"),
)
