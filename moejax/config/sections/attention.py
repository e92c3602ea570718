"""The leaves of attention."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import all_of, any_of, other_than, value
from moejax.config.sections.model import ModelConfig

HAS_FACTOR = value("attention.rope_scaling", "linear", "llama3", "yarn")
HAS_RAMP = value("attention.rope_scaling", "yarn", "llama3")
HAS_YARN = value("attention.rope_scaling", "yarn")
HAS_LONG_ROPE = value("attention.rope_scaling", "longrope")

HAS_GROUPS = value("attention.kind", "grouped_query")
IS_LATENT = value("attention.kind", "latent")
IS_ROUTED = value("attention.kind", "routed")
HAS_HEADS = other_than("attention.kind", "latent")
HAS_WINDOW = other_than("attention.window", 0)
MAY_LACK_ROPE = all_of(HAS_GROUPS, other_than("attention.rope_layers", "rope"))

FULL = 2**30
"""A window or a chunk that is as long as any text."""

KINDS = {
    "window_layers": ("window", "full"),
    "chunk_layers": ("chunk", "full"),
    "rope_layers": ("rope", "none"),
}
"""What each pattern lists of layers: what they have first, and then what the others are."""


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
    score_cap: float = leaf(
        0.0,
        "limit that scores approach by tanh, c tanh(score / c); 0: none",
        at_least=0,
        needs=HAS_GROUPS,
    )
    temperature: float = leaf(
        0.0,
        "growth of queries with the logarithm of their position, in layers without rotary "
        "positions; 0: none",
        at_least=0,
        needs=MAY_LACK_ROPE,
    )
    temperature_length: int = leaf(
        8192,
        "positions after each of which queries grow",
        at_least=1,
        needs=all_of(MAY_LACK_ROPE, other_than("attention.temperature", 0)),
    )
    qk_norm: Literal["none", "head", "whole", "unweighted"] = leaf(
        "none",
        "norm of queries and keys: of each head, of all heads as one vector, or an RMSNorm of each "
        "head without weights",
        needs=HAS_GROUPS,
    )
    qk_norm_after_rope: bool = leaf(
        False,
        "normalise queries and keys with their positions; otherwise before they have any",
        needs=all_of(HAS_GROUPS, other_than("attention.qk_norm", "none")),
    )
    qk_norm_layers: Literal["all", "rope"] = leaf(
        "all",
        "layers with that norm: all, or those with rotary positions",
        needs=all_of(MAY_LACK_ROPE, value("attention.qk_norm", "unweighted")),
    )
    qkv_bias: bool = leaf(False, "biases of queries, keys and values", needs=HAS_GROUPS)
    out_bias: bool = leaf(False, "bias of the output")
    latent_bias: bool = leaf(
        False, "biases of what makes latent vectors of tokens", needs=IS_LATENT
    )
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
        needs=HAS_WINDOW,
    )
    chunk: int = leaf(
        0,
        "positions of a chunk of a document, outside of which queries of layers with chunks see no "
        "key; 0: no layer has them",
        at_least=0,
        needs=HAS_GROUPS,
    )
    chunk_layers: str = leaf(
        "chunk",
        "which layers have chunks: chunk or full for each in turn, such as chunk, chunk, full",
        needs=other_than("attention.chunk", 0),
    )
    sinks: bool = leaf(
        False, "a learned score of each head, to which no key belongs", needs=HAS_GROUPS
    )
    rope_interleaved: bool = leaf(
        False, "rotate neighbouring dimensions; otherwise those of the two halves of a head"
    )
    rope_layers: str = leaf(
        "rope",
        "which layers have rotary positions: rope or none for each in turn, such as rope, none",
        needs=HAS_GROUPS,
    )
    rope_dim: int = leaf(
        0,
        "dimensions of a head that are rotated, its first ones; 0: all",
        at_least=0,
        needs=HAS_GROUPS,
    )
    rope_theta: float = leaf(10_000.0, "base of the rotary position embedding", at_least=1)
    rope_theta_window: float = leaf(
        0.0,
        "its base in layers with a window, whose frequencies are not scaled; 0: as in all others",
        at_least=1,
        also=(0.0,),
        needs=HAS_WINDOW,
    )
    rope_scaling: Literal["none", "linear", "llama3", "longrope", "yarn"] = leaf(
        "none", "how rotary frequencies are changed for longer texts than those of training"
    )
    rope_factor: float = leaf(
        4.0, "how much longer texts are than rope_original_length", at_least=1, needs=HAS_FACTOR
    )
    rope_original_length: int = leaf(
        4096,
        "tokens of a text in training before",
        at_least=1,
        needs=any_of(HAS_RAMP, other_than("attention.rope_long_magnitude", 0)),
    )
    rope_beta_fast: float = leaf(
        32.0, "turns within that length from which on a frequency stays", above=0, needs=HAS_RAMP
    )
    rope_beta_slow: float = leaf(
        1.0,
        "turns within that length up to which a frequency is divided by the factor",
        above=0,
        needs=HAS_RAMP,
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
    def changes_with_length(self) -> bool:
        """Whether all of a text is rotated otherwise once it exceeds `rope_original_length`."""
        if self.rope_scaling != "longrope":
            return False
        return self.rope_long_magnitude not in (0, self.rope_magnitude or 1.0)

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
        return _sizes(self.window_layers, self.window, num_layers)

    def chunks(self, num_layers: int) -> tuple[int, ...]:
        """Returns the positions of a chunk in each layer; `FULL` where there are no chunks."""
        return _sizes(self.chunk_layers, self.chunk, num_layers)

    def have_rope(self, num_layers: int) -> tuple[bool, ...]:
        """Returns whether each layer has rotary positions."""
        return tuple(kind == "rope" for kind in _kinds(self.rope_layers, num_layers))


def _kinds(pattern: str, num_layers: int) -> Sequence[str]:
    """Returns the kind of each layer by a pattern, which is repeated."""
    kinds = [kind.strip() for kind in pattern.split(",")]
    return [kinds[layer % len(kinds)] for layer in range(num_layers)]


def _sizes(pattern: str, size: int, num_layers: int) -> tuple[int, ...]:
    """Returns the size in each layer; `FULL` in full ones, or where the size is 0."""
    kinds = _kinds(pattern, num_layers)
    return tuple(FULL if kind == "full" or not size else size for kind in kinds)


def validate_attention(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` for leaves that do not go together, or with the width of the model."""
    _validate_patterns(attention)
    require(
        attention.rope_scaling != "llama3" or attention.rope_beta_slow <= attention.rope_beta_fast,
        f"attention.rope_beta_slow={attention.rope_beta_slow} must be at most "
        f"attention.rope_beta_fast={attention.rope_beta_fast} with attention.rope_scaling=llama3",
    )
    if attention.kind == "latent":
        _validate_latent(attention)
        _validate_long_rope(attention, attention.d_rope)
        return
    if attention.kind == "routed":
        _validate_routed(attention)
    _validate_widths(attention, model)
    _validate_rotated(attention, model)
    if attention.num_heads % attention.num_kv_heads:
        fitting = divisors(attention.num_heads, attention.num_kv_heads)
        raise ConfigError(
            f"attention.num_heads={attention.num_heads} must be a multiple of "
            f"attention.num_kv_heads={attention.num_kv_heads}; use one of {fitting} "
            "for attention.num_kv_heads"
        )
    head = attention.head_dim or model.d_model // attention.num_heads
    _validate_long_rope(attention, attention.rope_dim or head)


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


def _validate_patterns(attention: AttentionConfig) -> None:
    patterns = {
        "window_layers": attention.window_layers,
        "chunk_layers": attention.chunk_layers,
        "rope_layers": attention.rope_layers,
    }
    for name, pattern in patterns.items():
        first, second = KINDS[name]
        for kind in pattern.split(","):
            require(
                kind.strip() in KINDS[name],
                f"attention.{name}={pattern!r} must list {first} or {second} for each layer in "
                f"turn, such as {first}, {second}",
            )


def _validate_widths(attention: AttentionConfig, model: ModelConfig) -> None:
    """Requires an even width of heads: rotary embeddings turn pairs of features."""
    if attention.head_dim:
        require(
            attention.head_dim % 2 == 0,
            f"attention.head_dim={attention.head_dim} must be even; use {attention.head_dim + 1}",
        )
        return
    step = 2 * attention.num_heads
    nearest_width = step * max(1, round(model.d_model / step))
    require(
        model.d_model % step == 0,
        f"model.d_model={model.d_model} must be an even multiple of "
        f"attention.num_heads={attention.num_heads}; use {nearest_width}, "
        "or set attention.head_dim",
    )


def _validate_rotated(attention: AttentionConfig, model: ModelConfig) -> None:
    head = attention.head_dim or model.d_model // attention.num_heads
    require(
        attention.rope_dim % 2 == 0 and attention.rope_dim <= head,
        f"attention.rope_dim={attention.rope_dim} must be even and at most the width of a head, "
        f"{head}; use 0 to rotate all of it",
    )


def _validate_latent(attention: AttentionConfig) -> None:
    require(
        attention.d_rope % 2 == 0,
        f"attention.d_rope={attention.d_rope} must be even; use {attention.d_rope + 1}",
    )
