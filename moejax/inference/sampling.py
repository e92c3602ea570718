"""How a token is drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CANDIDATES = 256
"""How many of the most probable tokens are looked at first: they hold nearly every nucleus.

Finding them is much faster than sorting the vocabulary.
"""

LARGEST_TOP_K = 2**24
"""No vocabulary is larger."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits.

    Attributes:
      temperature: logits are divided by it.
      top_p: mass of the nucleus; its most probable token always belongs to it.
      top_k: the most tokens of a nucleus; the mass is counted among as many.
      keys_B: one key per sequence.
      method: what is compiled: `greedy` takes the most probable token, `all` draws from all tokens,
        `nucleus` from the most probable ones.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    keys_B: jax.Array
    method: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_settings(
        cls, temperature: float, top_p: float, keys_B: jax.Array, top_k: int = 0
    ) -> "Sampling":
        """Returns the settings with the cheapest method that serves them; `top_k=0` is no limit."""
        if temperature <= 0:
            method = "greedy"
        elif top_p < 1 or top_k:
            method = "nucleus"
        else:
            method = "all"
        limit = top_k or LARGEST_TOP_K
        return cls(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(limit), keys_B, method)


def sample(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    positions_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Draws one token per sequence.

    Args:
      logits_BV: float32.
      sampling: how tokens are drawn.
      positions_B: folded into the keys, so that each position has its own draw.
    """
    if sampling.method == "greedy":
        most_probable_B = jnp.argmax(logits_BV, axis=-1)
        return most_probable_B.astype(jnp.int32)
    temperature = jnp.maximum(sampling.temperature, 1e-6)
    scaled_BV = logits_BV / temperature
    keys_B = jax.vmap(jax.random.fold_in)(sampling.keys_B, positions_B)
    if sampling.method == "all":
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV)
        return drawn_B.astype(jnp.int32)
    return _sample_nucleus(scaled_BV, sampling, keys_B)


def _sample_nucleus(
    scaled_BV: jax.Array,
    sampling: Sampling,
    keys_B: jax.Array,
) -> jax.Array:
    """Draws from the smallest set of most probable tokens whose probability reaches `top_p`.

    With `top_k` that is the probability among the K most probable tokens. Of equally probable
    tokens the first ones belong to the set. All tokens are sorted only in a step in which a nucleus
    is larger than `CANDIDATES`. A draw belongs to a rank, so that it does not depend on how many
    ranks are looked at.

    Source: Holtzman et al. 2020 (nucleus sampling, section 3.1).
    """
    vocab_size = scaled_BV.shape[-1]
    # `top_k` ranks -0 below 0, although they are equal.
    scaled_BV = jnp.where(scaled_BV == 0, 0.0, scaled_BV)

    def draw(num_ranks: int) -> tuple[jax.Array, jax.Array]:
        return _draw_from_ranks(scaled_BV, sampling, keys_B, num_ranks)

    if vocab_size <= CANDIDATES:
        drawn_B, _ = draw(vocab_size)
        return drawn_B
    drawn_B, is_complete_B = draw(CANDIDATES)

    def redraw_incomplete() -> jax.Array:
        redrawn_B, _ = draw(vocab_size)
        return jnp.where(is_complete_B, drawn_B, redrawn_B)

    are_all_complete = is_complete_B.all()
    return jax.lax.cond(are_all_complete, lambda: drawn_B, redraw_incomplete)


def _draw_from_ranks(
    scaled_BV: jax.Array,
    sampling: Sampling,
    keys_B: jax.Array,
    num_ranks: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws from the part of the nucleus that is among the R = `num_ranks` most probable tokens.

    Returns:
      Tokens `[B]`, and whether these ranks hold the complete nucleus, `[B]`.
    """
    sorted_BR, tokens_BR = jax.lax.top_k(scaled_BV, num_ranks)
    rank_R = jnp.arange(num_ranks)
    sorted_BR = jnp.where(rank_R < sampling.top_k, sorted_BR, -jnp.inf)
    has_top_k = sampling.top_k <= num_ranks
    of_all_B1 = jax.nn.logsumexp(scaled_BV, axis=-1, keepdims=True)
    of_top_k_B1 = jax.nn.logsumexp(sorted_BR, axis=-1, keepdims=True)
    log_total_B1 = jnp.where(has_top_k, of_top_k_B1, of_all_B1)
    probs_BR = jnp.exp(sorted_BR - log_total_B1)
    mass_BR = jnp.cumsum(probs_BR, axis=-1)
    mass_before_BR = mass_BR - probs_BR
    is_below_BR = mass_before_BR < sampling.top_p
    is_in_nucleus_BR = is_below_BR.at[:, 0].set(True)
    nucleus_BR = jnp.where(is_in_nucleus_BR, sorted_BR, -jnp.inf)
    rank_B = jax.vmap(jax.random.categorical)(keys_B, nucleus_BR)
    rank_B1 = rank_B[:, None]
    drawn_B1 = jnp.take_along_axis(tokens_BR, rank_B1, axis=-1)
    mass_B = mass_BR[:, -1]
    # Among all tokens; with a limit beyond these ranks their total is not known here.
    is_unlimited = sampling.top_k >= scaled_BV.shape[-1]
    is_complete_B = has_top_k | (is_unlimited & (mass_B >= sampling.top_p))
    return drawn_B1[:, 0], is_complete_B
