"""Autoregressive sampling: one pass over the prompts, then a token at a time with cached keys and values.

Prompts of a batch may differ in length: they are padded on the right, and each sequence keeps its
own position. What a padded position wrote to the cache is overwritten before anything sees it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import ROUTER_RULES, Config, ConfigError
from moejax.data import Tokenizer
from moejax.inference.layered import LayeredDecoder
from moejax.models import Decoder
from moejax.nn.attention.grouped_query import KVCache
from moejax.seeds import check_seed

MAX_TOKENS = 65_536
"""The cache holds keys and values of every position at once."""

CANDIDATES = 256
"""Of the most probable tokens, which hold most nuclei; to find them is much faster than to sort a vocabulary."""

HOTTEST = 1e6
"""The highest temperature: all tokens are alike there, and ids that are no token are still never drawn."""

log = logging.getLogger("moejax")


def generate(
    model: Decoder | LayeredDecoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continues prompts, yielding the next token of each as soon as it is known.

    Args:
      model: the decoder; one that is given whole is taken apart in each call, which needs memory
        for its weights once more. Routing is dropless, so that a sequence does not depend on the
        others of its batch, unless `moe.eval_capacity_factor` limits it, of which the log tells.
      tokenizer: the run's own.
      prompts: texts; each is preceded by the begin-of-document token.
      max_tokens: how many tokens to add at most.
      temperature: logits are divided by it; 0 takes the most probable token.
      top_p: sample from the smallest set of most probable tokens whose probability reaches this.
      seed: of the sampling; sequence i draws from its own stream, so that it does not depend
        on the others.

    Yields:
      For each step a list with one token id per prompt; None once its document has ended.

    Raises:
      ConfigError: no prompt, or an argument out of range.
    """
    _check(prompts, max_tokens, temperature, top_p)
    check_seed("--seed", seed)
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    lengths = np.array([len(row) for row in rows], np.int32)
    trained_length = model.config.data.seq_len
    if lengths.max() + max_tokens > trained_length:
        log.warning(
            "beyond %d tokens, the length of training rows, the model is on unknown ground",
            trained_length,
        )
    longest = _round_up(int(lengths.max()))  # few distinct lengths, so few compilations
    blind = sorted(
        {
            moe.router
            for moe in model.config.moe_groups
            if not ROUTER_RULES[moe.router].takes_capacity
        }
    )
    if blind:
        log.warning(
            "moe.router=%s looks at later tokens, which do not exist yet: text will be poor",
            ", ".join(blind),
        )
    _warn_of_capacity(model.config)
    tokens_BL = np.full((len(rows), longest), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens_BL, rows, strict=True):
        row[: len(ids)] = ids
    decoder = LayeredDecoder(model) if isinstance(model, Decoder) else model
    cache = decoder.init_cache(len(rows), _round_up(longest + max_tokens))
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(rows)))
    sampling = Sampling.from_settings(temperature, top_p, keys_B)
    next_B, positions_B, cache = prefill(
        decoder, jnp.asarray(tokens_BL), jnp.asarray(lengths), cache, sampling
    )
    is_done_B = np.zeros(len(rows), bool)
    for step in range(max_tokens):
        last_B = next_B
        if step + 1 < max_tokens:  # the device goes on while this token is read
            next_B, positions_B, cache = decode(decoder, next_B, positions_B, cache, sampling)
        ids_B = np.asarray(last_B)
        is_done_B |= ids_B == tokenizer.eos_id
        yield [None if done else int(token) for token, done in zip(ids_B, is_done_B, strict=True)]
        if is_done_B.all():
            return


def generate_text(
    model: Decoder | LayeredDecoder, tokenizer: Tokenizer, prompts: Sequence[str], **sampling
) -> list[str]:
    """Whole continuations, without the prompts; see `generate`."""
    ids: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, tokenizer, prompts, **sampling):
        for row, token in zip(ids, step, strict=True):
            if token is not None:
                row.append(token)
    return [tokenizer.decode(row) for row in ids]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits.

    Attributes:
      temperature: logits are divided by it.
      top_p: mass of the nucleus; its most probable token always belongs to it.
      keys_B: one key per sequence.
      method: what is compiled: `greedy` takes the most probable token, `all` draws from all tokens,
        `nucleus` from the most probable ones.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    keys_B: jax.Array
    method: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_settings(cls, temperature: float, top_p: float, keys_B: jax.Array) -> "Sampling":
        """With the method that does no more than these need."""
        cut = "nucleus" if top_p < 1 else "all"
        return cls(
            jnp.float32(temperature),
            jnp.float32(top_p),
            keys_B,
            cut if temperature > 0 else "greedy",
        )


def sample(
    logits_BV: Float[Array, "B V"], sampling: Sampling, positions_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Draws one token per sequence.

    Args:
      logits_BV: float32.
      sampling: how.
      positions_B: folded into the keys, so that each position has its own draw.
    """
    if sampling.method == "greedy":
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)
    keys_B = jax.vmap(jax.random.fold_in)(sampling.keys_B, positions_B)
    if sampling.method == "all":
        return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)
    return _sample_nucleus(scaled_BV, sampling.top_p, keys_B)


def _sample_nucleus(scaled_BV: jax.Array, top_p: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws from the smallest set of most probable tokens whose probability reaches `top_p`; of equals the first count.

    All tokens are sorted only in a step in which a nucleus is larger than `CANDIDATES`. A draw
    belongs to a rank, so that it does not depend on how many ranks are looked at.

    Source: Holtzman et al. 2020 (nucleus sampling, section 3.1).
    """
    vocab_size = scaled_BV.shape[-1]
    scaled_BV = jnp.where(
        scaled_BV == 0, 0.0, scaled_BV
    )  # `top_k` ranks -0 below 0, and they are equal
    log_total_B1 = jax.nn.logsumexp(scaled_BV, axis=-1, keepdims=True)

    def draw(num_ranks: int) -> tuple[jax.Array, jax.Array]:
        """The tokens drawn from so many ranks, and whether these hold the nucleus."""
        sorted_BR, tokens_BR = jax.lax.top_k(scaled_BV, num_ranks)
        probs_BR = jnp.exp(sorted_BR - log_total_B1)
        mass_BR = jnp.cumsum(probs_BR, axis=-1)
        is_in_BR = (mass_BR - probs_BR < top_p).at[:, 0].set(True)
        chosen_B = jax.vmap(jax.random.categorical)(
            keys_B, jnp.where(is_in_BR, sorted_BR, -jnp.inf)
        )
        drawn_B = jnp.take_along_axis(tokens_BR, chosen_B[:, None], axis=-1)[:, 0]
        return drawn_B, mass_BR[:, -1] >= top_p

    if vocab_size <= CANDIDATES:
        return draw(vocab_size)[0]
    drawn_B, is_held_B = draw(CANDIDATES)
    return jax.lax.cond(
        is_held_B.all(), lambda: drawn_B, lambda: jnp.where(is_held_B, drawn_B, draw(vocab_size)[0])
    )


def prefill(
    decoder: LayeredDecoder,
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, "B"],
    cache: list[KVCache],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"], list[KVCache]]:
    """The first token behind each prompt, its position, and the cache of the prompts.

    Args:
      decoder: the model.
      tokens_BL: prompts, padded on the right.
      lengths_B: of the prompts.
      cache: an empty one, which is overwritten.
      sampling: how tokens are drawn.
    """
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    x_BLD, cache = decoder.extend(tokens_BL, positions_BL, cache, positions_BL < lengths_B[:, None])
    last_B1D = jnp.take_along_axis(x_BLD, (lengths_B - 1)[:, None, None], axis=1)
    return *_draw(decoder.logits(last_B1D), lengths_B - 1, sampling), cache


def decode(
    decoder: LayeredDecoder,
    tokens_B: Int[Array, "B"],
    positions_B: Int[Array, "B"],
    cache: list[KVCache],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"], list[KVCache]]:
    """The token behind each of these ones, its position, and the cache with these; see `prefill`."""
    x_B1D, cache = decoder.extend(tokens_B[:, None], positions_B[:, None], cache)
    return *_draw(decoder.logits(x_B1D), positions_B, sampling), cache


@jax.jit
def _draw(logits_B1V, positions_B, sampling):
    """The token after those at `positions_B`, and its position."""
    return sample(logits_B1V[:, 0], sampling, positions_B + 1), positions_B + 1


def _warn_of_capacity(config: Config) -> None:
    """Says what a capacity in evaluation means for tokens that come one at a time."""
    limited = [
        moe
        for moe in config.moe_groups
        if moe.dispatch == "capacity" and moe.eval_capacity_factor > 0
    ]
    groups = {moe.capacity_group for moe in limited}
    if "sequence" in groups:
        log.warning(
            "moe.eval_capacity_factor with moe.capacity_group=sequence drops choices of the prompt, never of what is "
            "written: a token alone in its step finds room; evaluation of the same text may drop some"
        )
    if groups - {"sequence"}:
        log.warning(
            "moe.eval_capacity_factor drops choices here as well: what is written depends on the batch"
        )


def _check(prompts, max_tokens, temperature, top_p) -> None:
    if not prompts:
        raise ConfigError("--prompt is missing; give at least one")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--max_tokens={max_tokens} must be between 1 and {MAX_TOKENS}")
    if not 0 <= temperature <= HOTTEST:
        raise ConfigError(f"--temperature={temperature} must be between 0 and {HOTTEST:g}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top_p={top_p} must be above 0 and at most 1")


def _round_up(length: int) -> int:
    return -(-length // 32) * 32
