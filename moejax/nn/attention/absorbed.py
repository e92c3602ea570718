"""Latent attention to the latent vectors themselves, for a few queries and a cache.

The scores of a head are products of its queries and `key_up @ latent`; they are also products of
`query @ key_up` and the latent vectors, which all heads share. So no key or value of a head is made
of the cached ones: queries are multiplied by the key part of `kv_up` before, and what they see by
its value part after.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import AttentionConfig
from moejax.nn.attention.cache import LatentCache
from moejax.nn.attention.causal_blocks import MASKED
from moejax.nn.mask import AttentionMask


def is_cheaper_absorbed(config: AttentionConfig, num_queries: int, num_keys: int) -> bool:
    """Whether this form multiplies less than one that expands keys and values of each head.

    Expanding takes as long for one query as for many, and then heads are narrow: with the widths of
    DeepSeek-V3 it pays from about 170 queries on, that is for prompts and not for a token at a
    time.

    Args:
      config: for the widths.
      num_queries: of each sequence.
      num_keys: slots of the cache.
    """
    d_up = config.d_nope + config.d_value
    d_latent, d_rope = config.d_kv_latent, config.d_rope
    num_pairs = num_queries * num_keys
    expanded = num_keys * d_latent * d_up + num_pairs * (d_up + d_rope)
    absorbed = num_queries * d_latent * d_up + num_pairs * (2 * d_latent + d_rope)
    return absorbed < expanded


def attend_absorbed(
    q_BLHA: Float[Array, "B L H A"],
    seen: LatentCache,
    kv_up_CHX: Float[Array, "C H X"],
    mask: AttentionMask,
) -> Float[Array, "B L H V"]:
    """Returns what queries see of the values of each head.

    Args:
      q_BLHA: queries, of which the last dimensions have positions, as many as cached keys have.
      seen: latent vectors and keys with positions.
      kv_up_CHX: maps a latent vector to the key without position of each head, then to its value.
      mask: which keys each query may see.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.2 and appendix C.
    """
    width = q_BLHA.shape[-1]
    d_nope = width - seen.key_BSA.shape[-1]
    key_up_CHA, value_up_CHV = jnp.split(kv_up_CHX, [d_nope], axis=-1)
    plain_BLHA, turned_BLHA = jnp.split(q_BLHA, [d_nope], axis=-1)
    q_BLHC = jnp.einsum("BLHA,CHA->BLHC", plain_BLHA, key_up_CHA)
    scores_BHLS = _scores(q_BLHC, seen.latent_BSC) + _scores(turned_BLHA, seen.key_BSA)
    scores_BHLS *= width**-0.5
    batch, length = q_BLHA.shape[:2]
    mask_BLS = mask.materialize(batch, length, seen.latent_BSC.shape[1])
    scores_BHLS = jnp.where(mask_BLS[:, None], scores_BHLS, MASKED)
    weights_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(q_BLHA.dtype)
    y_BLHC = jnp.einsum("BHLS,BSC->BLHC", weights_BHLS, seen.latent_BSC)
    return jnp.einsum("BLHC,CHV->BLHV", y_BLHC, value_up_CHV)


def _scores(q_BLHC: jax.Array, k_BSC: jax.Array) -> jax.Array:
    """Returns products of queries and keys that all heads share, in float32."""
    return jnp.einsum("BLHC,BSC->BHLS", q_BLHC, k_BSC, preferred_element_type=jnp.float32)
