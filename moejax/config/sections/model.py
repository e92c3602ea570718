"""The leaves of the decoder around the experts."""

import dataclasses
from typing import Literal

from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import DenseLayer, Derived, any_of, value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder around the experts."""

    num_layers: int = leaf(
        4, "layers, each of attention and a feed-forward block", at_least=1, at_most=10_000
    )
    d_model: int = leaf(256, "width of the residual stream", at_least=1)
    d_ff: int = leaf(
        1024,
        "hidden width of the dense feed-forward layers",
        at_least=1,
        needs=any_of(DenseLayer(), Derived("moe.d_expert"), value("model.shortcut", True)),
        may_be_unread=True,
    )
    ffn_bias: bool = leaf(
        False,
        "biases of the dense feed-forward layers",
        needs=DenseLayer(),
        may_be_unread=True,
    )
    vocab_size: int = leaf(
        0,
        "rows of the embedding, such as those of a released model; 0: the tokenizer's",
        at_least=0,
    )
    tied_embeddings: bool = leaf(True, "one matrix for the embedding and the logits")
    logits_bias: bool = leaf(False, "a bias of the logits")
    logits_divisor: float = leaf(1.0, "what logits are divided by", above=0)
    logits_cap: float = leaf(
        0.0, "c of the soft cap c tanh(logits / c), after the division; 0: none", at_least=0
    )
    norm: Literal["rms", "zero_centered_rms", "layer", "layer_without_bias"] = leaf(
        "rms",
        "kind of all norms but those of latent vectors: RMSNorm, the same with a scale that is "
        "stored as its difference from 1, or LayerNorm",
    )
    norm_epsilon: float = leaf(
        1e-6, "added to the mean square, or to the variance, in every norm", above=0
    )
    final_norm_epsilon: float = leaf(
        0.0, "the same in the norm after the last layer; 0: norm_epsilon", at_least=0
    )
    norm_order: Literal["pre", "post", "sandwich"] = leaf(
        "pre",
        "whether a norm is before attention and before the feed-forward part, after each of them "
        "but within the residual, or both",
    )
    parallel_residual: bool = leaf(
        False,
        "attention and the feed-forward part read the same normed input, and both are added",
        needs=value("model.norm_order", "pre"),
    )
    shortcut: bool = leaf(
        False,
        "a layer has two times attention and a dense network of width d_ff, of which the first and "
        "the experts read the same; the experts are added at the end",
    )
    residual_multiplier: float = leaf(
        1.0, "factor on what attention and the feed-forward part add to the residual", above=0
    )
    embedding_multiplier: float = leaf(
        0.0, "factor on embeddings on the way in; 0: the square root of d_model", at_least=0
    )
    compute_dtype: Literal["float32", "bfloat16"] = leaf(
        "float32", "dtype of matrix products; parameters are float32 either way"
    )
    remat: bool = leaf(True, "recompute each layer in the backward pass, but never its routing")
    scan_layers: bool = leaf(
        True, "scan equal layers with one program; False unrolls them, which compiles longer"
    )
