"""The leaves of attention."""

import dataclasses
from typing import Literal

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.schema.leaf import leaf
from moejax.config.sections.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention, of which every layer has one."""

    num_heads: int = leaf(4, "query heads", at_least=1)
    num_kv_heads: int = leaf(2, "key and value heads, shared by groups of query heads", at_least=1)
    head_dim: int = leaf(0, "width of a head; 0: model.d_model / attention.num_heads", at_least=0)
    qk_norm: Literal["none", "head", "whole"] = leaf(
        "none", "RMSNorm on queries and keys: of each head, or of all heads as one vector"
    )
    qkv_bias: bool = leaf(False, "biases of queries, keys and values")
    out_bias: bool = leaf(False, "bias of the output")
    clip_qkv: float = leaf(
        0.0, "largest magnitude of queries, keys and values; 0: no limit", at_least=0
    )
    rope_theta: float = leaf(10_000.0, "base of the rotary position embedding", at_least=1)


def validate_attention(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` for numbers of heads that do not divide what they split."""
    # Rotary embeddings turn pairs of features, so a head has an even width.
    if attention.head_dim:
        require(
            attention.head_dim % 2 == 0,
            f"attention.head_dim={attention.head_dim} must be even; use {attention.head_dim + 1}",
        )
    else:
        step = 2 * attention.num_heads
        nearest_width = step * max(1, round(model.d_model / step))
        require(
            model.d_model % step == 0,
            f"model.d_model={model.d_model} must be an even multiple of "
            f"attention.num_heads={attention.num_heads}; use {nearest_width}, "
            "or set attention.head_dim",
        )
    if attention.num_heads % attention.num_kv_heads:
        fitting = divisors(attention.num_heads, attention.num_kv_heads)
        raise ConfigError(
            f"attention.num_heads={attention.num_heads} must be a multiple of "
            f"attention.num_kv_heads={attention.num_kv_heads}; use one of {fitting} "
            "for attention.num_kv_heads"
        )
