"""The leaves of the decoder around the experts."""

import dataclasses
from typing import Literal

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import DenseLayer, Derived, any_of


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder around the experts."""

    num_layers: int = leaf(
        4, "layers, each of attention and a feed-forward block", at_least=1, at_most=10_000
    )
    d_model: int = leaf(256, "width of the residual stream", at_least=1)
    num_heads: int = leaf(4, "query heads; the head width is d_model / num_heads", at_least=1)
    num_kv_heads: int = leaf(2, "key and value heads, shared by groups of query heads", at_least=1)
    d_ff: int = leaf(
        1024,
        "hidden width of the dense feed-forward layers",
        at_least=1,
        needs=any_of(DenseLayer(), Derived("moe.d_expert")),
        may_be_unread=True,
    )
    qk_norm: bool = leaf(False, "RMSNorm on queries and keys")
    tied_embeddings: bool = leaf(True, "one matrix for the embedding and the logits")
    rope_theta: float = leaf(10_000.0, "base of the rotary position embedding", at_least=1)
    compute_dtype: Literal["float32", "bfloat16"] = leaf(
        "float32", "dtype of matrix products; parameters are float32 either way"
    )
    remat: bool = leaf(True, "recompute each layer in the backward pass, but never its routing")
    scan_layers: bool = leaf(
        True, "scan equal layers with one program; False unrolls them, which compiles longer"
    )


def validate_model(model: ModelConfig) -> None:
    """Raises `ConfigError` for numbers of heads that do not divide what they split."""
    # Rotary embeddings turn pairs of features, so a head has an even width.
    step = 2 * model.num_heads
    nearest_width = step * max(1, round(model.d_model / step))
    require(
        model.d_model % step == 0,
        f"model.d_model={model.d_model} must be an even multiple of "
        f"model.num_heads={model.num_heads}; use {nearest_width}",
    )
    if model.num_heads % model.num_kv_heads:
        fitting = divisors(model.num_heads, model.num_kv_heads)
        raise ConfigError(
            f"model.num_heads={model.num_heads} must be a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}; use one of {fitting} "
            "for model.num_kv_heads"
        )
