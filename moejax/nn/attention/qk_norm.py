"""The norm of queries and keys: of each head, of all heads as one vector, or without weights."""

import jax
import jax.numpy as jnp

from moejax.config import AttentionConfig
from moejax.nn.attention.layer_options import LayerOptions
from moejax.nn.norm import normalize_rms
from moejax.nn.norms import MakeNorm, Norm


def make_qk_norms(config: AttentionConfig, head: int, make_norm: MakeNorm) -> tuple[Norm, Norm]:
    """Returns the norms of queries and of keys, of a model whose norms have weights.

    Args:
      config: for `qk_norm` and the numbers of heads.
      head: width of a head.
      make_norm: makes a norm of a width.
    """
    if config.qk_norm == "whole":
        return make_norm(config.num_heads * head), make_norm(config.num_kv_heads * head)
    return make_norm(head), make_norm(head)


def norm_whole(norm: Norm, x_BLHA: jax.Array) -> jax.Array:
    """Returns all heads of a position normalised as one vector."""
    batch, length, heads, head = x_BLHA.shape
    normed_BLX = norm(x_BLHA.reshape(batch, length, heads * head))
    return normed_BLX.reshape(x_BLHA.shape)


def norm_unweighted(
    x_BLHA: jax.Array, config: AttentionConfig, epsilon: float, options: LayerOptions
) -> jax.Array:
    """Returns each head over its root mean square, in the layers of `qk_norm_layers`.

    Source: Llama 4, which calls it an L2 norm.
    """
    scale_A = jnp.ones(x_BLHA.shape[-1])
    normed_BLHA = normalize_rms(x_BLHA, scale_A, epsilon)
    if config.qk_norm_layers == "rope" and options.has_rope is not None:
        return jnp.where(options.has_rope, normed_BLHA, x_BLHA)
    return normed_BLHA
