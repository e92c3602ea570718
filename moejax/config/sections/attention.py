"""The leaves of attention."""

import dataclasses
import math
from typing import Literal

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import any_of, other_than, value
from moejax.config.sections.model import ModelConfig

HAS_YARN = value("attention.rope_scaling", "yarn")
HAS_LONG_ROPE = value("attention.rope_scaling", "longrope")

HAS_GROUPS = value("attention.kind", "grouped_query")
IS_LATENT = value("attention.kind", "latent")
IS_ROUTED = value("attention.kind", "routed")
HAS_HEADS = other_than("attention.kind", "latent")

FULL = 2**30
"""A window that is as wide as any text."""

WINDOW_KINDS = ("window", "full")
"""What `attention.window_layers` lists."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention, of which every layer has one."""

    kind: Literal["grouped_query", "routed", "latent"] = leaf(
        "grouped_query",
        "what keys and values are made of: heads that queries share, the same with queries and "
        "outputs of experts (MoA), or a latent vector (MLA)",
    )
    num_heads: int = leaf(4, "query heads", at_least=1)
    num_kv_heads: int = leaf(
        2,
        "key and value heads, shared by groups of query heads",
        at_least=1,
        needs=HAS_HEADS,
    )
    head_dim: int = leaf(
        0,
        "width of a head; 0: model.d_model / attention.num_heads",
        at_least=0,
        needs=HAS_HEADS,
    )
    num_query_experts: int = leaf(
        8,
        "experts of attention, each with a query head and an output for every key and value head",
        at_least=2,
        needs=IS_ROUTED,
    )
    top_k_query_experts: int = leaf(
        2, "experts of attention that a token chooses", at_least=2, needs=IS_ROUTED
    )
    router_loss_factor: float = leaf(
        1.0,
        "auxiliary losses of the router of attention, relative to those of the MoE layer's router",
        at_least=0,
        needs=IS_ROUTED,
    )
    d_query_latent: int = leaf(
        0, "width of the latent vector of queries; 0: none", at_least=0, needs=IS_LATENT
    )
    d_kv_latent: int = leaf(
        512, "width of the latent vector of keys and values", at_least=1, needs=IS_LATENT
    )
    d_nope: int = leaf(
        128, "width of the part of a query without position", at_least=1, needs=IS_LATENT
    )
    d_rope: int = leaf(
        64, "width of the part of a query with rotary positions", at_least=2, needs=IS_LATENT
    )
    d_value: int = leaf(128, "width of a value", at_least=1, needs=IS_LATENT)
    scale_latents: bool = leaf(
        False,
        "multiply queries, and the latent vector of keys and values, by the root of model.d_model "
        "over the width of their latent vector",
        needs=IS_LATENT,
    )
    score_factor: float = leaf(
        1.0,
        "factor on the products of queries and keys over the root of their width",
        above=0,
    )
    qk_norm: Literal["none", "head", "whole"] = leaf(
        "none",
        "norm of queries and keys: of each head, or of all heads as one vector",
        needs=HAS_GROUPS,
    )
    qkv_bias: bool = leaf(False, "biases of queries, keys and values", needs=HAS_GROUPS)
    out_bias: bool = leaf(False, "bias of the output", needs=HAS_HEADS)
    clip_qkv: float = leaf(
        0.0,
        "largest magnitude of queries, keys and values; 0: no limit",
        at_least=0,
        needs=HAS_GROUPS,
    )
    window: int = leaf(
        0,
        "keys that a query sees in layers with a window, its own the last; 0: no layer has one",
        at_least=0,
        needs=HAS_GROUPS,
    )
    window_layers: str = leaf(
        "window",
        "which layers have the window: window or full for each in turn, such as window, full",
        needs=other_than("attention.window", 0),
    )
    sinks: bool = leaf(
        False, "a learned score of each head, to which no key belongs", needs=HAS_GROUPS
    )
    rope_interleaved: bool = leaf(
        False, "rotate neighbouring dimensions; otherwise those of the two halves of a head"
    )
    rope_theta: float = leaf(10_000.0, "base of the rotary position embedding", at_least=1)
    rope_scaling: Literal["none", "longrope", "yarn"] = leaf(
        "none", "how rotary frequencies are changed for longer texts than those of training"
    )
    rope_factor: float = leaf(
        4.0, "how much longer texts are than rope_original_length", at_least=1, needs=HAS_YARN
    )
    rope_original_length: int = leaf(
        4096,
        "tokens of a text in training before",
        at_least=1,
        needs=any_of(HAS_YARN, other_than("attention.rope_long_magnitude", 0)),
    )
    rope_beta_fast: float = leaf(
        32.0, "turns within that length from which on a frequency stays", above=0, needs=HAS_YARN
    )
    rope_beta_slow: float = leaf(
        1.0,
        "turns within that length up to which a frequency is divided by the factor",
        above=0,
        needs=HAS_YARN,
    )
    rope_truncate: bool = leaf(
        True, "round the ends of the ramp between both to whole pairs", needs=HAS_YARN
    )
    rope_magnitude: float = leaf(
        0.0,
        "factor on rotated queries and keys; 0: 0.1 ln(rope_factor) + 1 with yarn, 1 with longrope",
        at_least=0,
        needs=any_of(HAS_YARN, HAS_LONG_ROPE),
    )
    rope_wavelengths: str = leaf(
        "",
        "factors on the wavelengths of all pairs of dimensions, such as 1.0, 1.05, 1.2",
        needs=HAS_LONG_ROPE,
    )
    rope_long_magnitude: float = leaf(
        0.0,
        "factor on rotated queries and keys where the longest text of a batch is longer than "
        "rope_original_length; 0: the same",
        at_least=0,
        needs=HAS_LONG_ROPE,
    )

    @property
    def wavelength_factors(self) -> tuple[float, ...]:
        """The numbers of `rope_wavelengths`.

        Raises:
          ConfigError: a text that is no list of numbers above 0.
        """
        try:
            factors = tuple(float(number) for number in self.rope_wavelengths.split(","))
        except ValueError:
            factors = ()
        require(
            bool(factors) and all(0 < factor < math.inf for factor in factors),
            f"attention.rope_wavelengths={self.rope_wavelengths!r} must list a number above 0 for "
            "each pair of dimensions, such as 1.0, 1.05, 1.2",
        )
        return factors

    def windows(self, num_layers: int) -> tuple[int, ...]:
        """Returns how many keys a query sees in each layer; `FULL` where there is no window."""
        widths = {"window": self.window, "full": FULL}
        kinds = self.window_layers.split(",")
        windows = []
        for layer in range(num_layers):
            kind = kinds[layer % len(kinds)].strip()
            windows.append(widths[kind])
        return tuple(windows)


def validate_attention(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` for numbers of heads that do not divide what they split."""
    for kind in attention.window_layers.split(","):
        require(
            kind.strip() in WINDOW_KINDS,
            f"attention.window_layers={attention.window_layers!r} must list window or full for "
            "each layer in turn, such as window, full",
        )
    if attention.kind == "latent":
        _validate_latent(attention)
        _validate_long_rope(attention, attention.d_rope)
        return
    if attention.kind == "routed":
        _validate_routed(attention)
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
    _validate_long_rope(attention, attention.head_dim or model.d_model // attention.num_heads)


def _validate_long_rope(attention: AttentionConfig, width: int) -> None:
    """Requires a factor for each pair of the dimensions that are rotated."""
    if attention.rope_scaling != "longrope":
        return
    num_factors = len(attention.wavelength_factors)
    require(
        num_factors == width // 2,
        f"attention.rope_wavelengths has {num_factors} factors; it must have {width // 2}, one for "
        f"each pair of the {width} dimensions that are rotated",
    )


def _validate_routed(attention: AttentionConfig) -> None:
    require(
        attention.top_k_query_experts <= attention.num_query_experts,
        f"attention.top_k_query_experts={attention.top_k_query_experts} must be at most "
        f"attention.num_query_experts={attention.num_query_experts}",
    )
    num_heads = attention.top_k_query_experts * attention.num_kv_heads
    require(
        attention.num_heads == num_heads,
        f"attention.num_heads={attention.num_heads} must be {num_heads}: a query head of each of "
        f"attention.top_k_query_experts={attention.top_k_query_experts} experts for each of "
        f"attention.num_kv_heads={attention.num_kv_heads} heads of keys",
    )


def _validate_latent(attention: AttentionConfig) -> None:
    require(
        attention.d_rope % 2 == 0,
        f"attention.d_rope={attention.d_rope} must be even; use {attention.d_rope + 1}",
    )
    d_key = attention.d_nope + attention.d_rope
    require(
        attention.d_value <= d_key,
        f"attention.d_value={attention.d_value} must be at most {d_key}, the sum of "
        f"attention.d_nope={attention.d_nope} and attention.d_rope={attention.d_rope}",
    )
