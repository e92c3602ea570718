"""Autoregressive sampling: a pass over the prompts, then a token at a time with a key/value cache.

Prompts of a batch may differ in length: they are padded on the right, and each sequence keeps its
own position. What a padded position wrote to the cache is overwritten before anything attends to
it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import ROUTER_RULES, Config, ConfigError, MoeConfig
from moejax.data import Tokenizer
from moejax.inference.layered import LayeredDecoder
from moejax.models import Decoder
from moejax.nn.attention.cache import Cache
from moejax.seeds import check_seed

MAX_TOKENS = 65_536
"""The cache holds keys and values of every position at once."""

CANDIDATES = 256
"""How many of the most probable tokens are looked at first: they hold nearly every nucleus.

Finding them is much faster than sorting the vocabulary.
"""

HOTTEST = 1e6
"""The highest temperature.

There all tokens are equally probable, and ids that are no token are still never drawn.
"""

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
      model: the decoder. A `Decoder` is converted to a `LayeredDecoder` in each call, which needs
        memory for a second copy of its weights. Routing is dropless, so that a sequence does not
        depend on the others of its batch, unless `moe.eval_capacity_factor` limits it, which is
        logged.
      tokenizer: the run's own.
      prompts: texts; each is preceded by the begin-of-document token.
      max_tokens: the largest number of tokens to add.
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
    tokens_BL, lengths_B = _pad_prompts(tokenizer, prompts)
    _warn_of_length(model.config, int(lengths_B.max()) + max_tokens)
    _warn_of_lookahead(model.config)
    _warn_of_capacity(model.config)
    decoder = LayeredDecoder(model) if isinstance(model, Decoder) else model
    batch, padded_length = tokens_BL.shape
    cache = decoder.init_cache(batch, _round_up(padded_length + max_tokens))
    sampling = Sampling.from_settings(temperature, top_p, _sequence_keys(seed, batch))
    next_B, positions_B, cache = prefill(
        decoder,
        jnp.asarray(tokens_BL),
        jnp.asarray(lengths_B),
        cache,
        sampling,
    )
    is_done_B = np.zeros(batch, bool)
    for step in range(max_tokens):
        current_B = next_B
        # Dispatched before the current token is read, so that the device never waits for the host.
        if step + 1 < max_tokens:
            next_B, positions_B, cache = decode(decoder, next_B, positions_B, cache, sampling)
        ids_B = np.asarray(current_B)
        is_done_B |= ids_B == tokenizer.eos_id
        yield _unfinished(ids_B, is_done_B)
        if is_done_B.all():
            return


def generate_text(
    model: Decoder | LayeredDecoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    **sampling,
) -> list[str]:
    """Returns the complete continuations, without the prompts; see `generate`."""
    steps = list(generate(model, tokenizer, prompts, **sampling))
    texts = []
    for tokens in zip(*steps, strict=True):
        ids = [token for token in tokens if token is not None]
        texts.append(tokenizer.decode(ids))
    return texts


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
        """Returns the settings with the cheapest method that serves them."""
        if temperature <= 0:
            method = "greedy"
        elif top_p < 1:
            method = "nucleus"
        else:
            method = "all"
        return cls(jnp.float32(temperature), jnp.float32(top_p), keys_B, method)


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
    return _sample_nucleus(scaled_BV, sampling.top_p, keys_B)


def _sample_nucleus(
    scaled_BV: jax.Array,
    top_p: jax.Array,
    keys_B: jax.Array,
) -> jax.Array:
    """Draws from the smallest set of most probable tokens whose probability reaches `top_p`.

    Of equally probable tokens the first ones belong to the set. All tokens are sorted only in a
    step in which a nucleus is larger than `CANDIDATES`. A draw belongs to a rank, so that it does
    not depend on how many ranks are looked at.

    Source: Holtzman et al. 2020 (nucleus sampling, section 3.1).
    """
    vocab_size = scaled_BV.shape[-1]
    # `top_k` ranks -0 below 0, although they are equal.
    scaled_BV = jnp.where(scaled_BV == 0, 0.0, scaled_BV)
    log_total_B1 = jax.nn.logsumexp(scaled_BV, axis=-1, keepdims=True)

    def draw(num_ranks: int) -> tuple[jax.Array, jax.Array]:
        return _draw_from_ranks(scaled_BV, log_total_B1, top_p, keys_B, num_ranks)

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
    log_total_B1: jax.Array,
    top_p: jax.Array,
    keys_B: jax.Array,
    num_ranks: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws from the part of the nucleus that is among the R = `num_ranks` most probable tokens.

    Returns:
      Tokens `[B]`, and whether these ranks hold the complete nucleus, `[B]`.
    """
    sorted_BR, tokens_BR = jax.lax.top_k(scaled_BV, num_ranks)
    probs_BR = jnp.exp(sorted_BR - log_total_B1)
    mass_BR = jnp.cumsum(probs_BR, axis=-1)
    mass_before_BR = mass_BR - probs_BR
    is_below_BR = mass_before_BR < top_p
    is_in_nucleus_BR = is_below_BR.at[:, 0].set(True)
    nucleus_BR = jnp.where(is_in_nucleus_BR, sorted_BR, -jnp.inf)
    rank_B = jax.vmap(jax.random.categorical)(keys_B, nucleus_BR)
    rank_B1 = rank_B[:, None]
    drawn_B1 = jnp.take_along_axis(tokens_BR, rank_B1, axis=-1)
    mass_B = mass_BR[:, -1]
    is_complete_B = mass_B >= top_p
    return drawn_B1[:, 0], is_complete_B


def prefill(
    decoder: LayeredDecoder,
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, "B"],
    cache: list[Cache],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"], list[Cache]]:
    """Returns the first token after each prompt, its position, and the cache of the prompts.

    Args:
      decoder: the model.
      tokens_BL: prompts, padded on the right.
      lengths_B: of the prompts.
      cache: an empty one, which is overwritten.
      sampling: how tokens are drawn.
    """
    length = tokens_BL.shape[1]
    position_L = jnp.arange(length)
    positions_BL = jnp.broadcast_to(position_L, tokens_BL.shape)
    is_token_BL = positions_BL < lengths_B[:, None]
    x_BLD, cache = decoder.extend(tokens_BL, positions_BL, cache, is_token_BL)
    last_positions_B = lengths_B - 1
    last_positions_B11 = last_positions_B[:, None, None]
    last_B1D = jnp.take_along_axis(x_BLD, last_positions_B11, axis=1)
    logits_B1V = decoder.logits(last_B1D)
    next_B, next_positions_B = _sample_next(logits_B1V, last_positions_B, sampling)
    return next_B, next_positions_B, cache


def decode(
    decoder: LayeredDecoder,
    tokens_B: Int[Array, "B"],
    positions_B: Int[Array, "B"],
    cache: list[Cache],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"], list[Cache]]:
    """Returns the next token of each sequence, its position, and the extended cache."""
    tokens_B1 = tokens_B[:, None]
    positions_B1 = positions_B[:, None]
    x_B1D, cache = decoder.extend(tokens_B1, positions_B1, cache)
    logits_B1V = decoder.logits(x_B1D)
    next_B, next_positions_B = _sample_next(logits_B1V, positions_B, sampling)
    return next_B, next_positions_B, cache


@jax.jit
def _sample_next(logits_B1V, positions_B, sampling):
    """Returns the token after those at `positions_B`, and its position."""
    next_positions_B = positions_B + 1
    logits_BV = logits_B1V[:, 0]
    next_B = sample(logits_BV, sampling, next_positions_B)
    return next_B, next_positions_B


def _pad_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
    """Returns token ids of the prompts, padded on the right, and their lengths."""
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        rows.append([tokenizer.bos_id, *ids])
    lengths = [len(row) for row in rows]
    shape = (len(rows), _round_up(max(lengths)))  # few distinct lengths, so few compilations
    tokens_BL = np.full(shape, tokenizer.pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens_BL[i, : len(row)] = row
    return tokens_BL, np.array(lengths, np.int32)


def _sequence_keys(seed: int, batch: int) -> jax.Array:
    """Returns a key for each sequence, which does not depend on the size of the batch."""
    key = jax.random.key(seed)

    def key_of(i):
        return jax.random.fold_in(key, i)

    sequence_B = jnp.arange(batch)
    return jax.vmap(key_of)(sequence_B)


def _unfinished(ids_B: np.ndarray, is_done_B: np.ndarray) -> list[int | None]:
    """Returns the tokens of a step, with None for each document that has ended."""
    tokens = zip(ids_B, is_done_B, strict=True)
    return [None if is_done else int(token) for token, is_done in tokens]


def _warn_of_length(config: Config, length: int) -> None:
    """Logs that text of `length` tokens is longer than what the model was trained on."""
    trained_length = config.data.seq_len
    if length > trained_length:
        log.warning(
            "beyond %d tokens, the length of training rows, the model is on unknown ground",
            trained_length,
        )


def _warn_of_lookahead(config: Config) -> None:
    """Logs which routers look at later tokens, which generation cannot give them."""
    routers = {moe.router for moe in config.moe_groups}
    lookahead = sorted(name for name in routers if not ROUTER_RULES[name].takes_capacity)
    if lookahead:
        log.warning(
            "moe.router=%s looks at later tokens, which do not exist yet: text will be poor",
            ", ".join(lookahead),
        )


def _warn_of_capacity(config: Config) -> None:
    """Logs what a capacity in evaluation means for tokens that come one at a time."""
    groups = {moe.capacity_group for moe in config.moe_groups if _has_eval_capacity(moe)}
    if "sequence" in groups:
        log.warning(
            "moe.eval_capacity_factor with moe.capacity_group=sequence drops choices of the "
            "prompt, never of what is written: a token alone in its step finds room; evaluation "
            "of the same text may drop some"
        )
    if groups - {"sequence"}:
        log.warning(
            "moe.eval_capacity_factor drops choices here as well: what is written depends on the "
            "batch"
        )


def _has_eval_capacity(moe: MoeConfig) -> bool:
    """Whether evaluation drops choices."""
    return moe.dispatch == "capacity" and moe.eval_capacity_factor > 0


def _check(
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    """Raises for an argument that is out of range."""
    if not prompts:
        raise ConfigError("--prompt is missing; give at least one")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--max_tokens={max_tokens} must be between 1 and {MAX_TOKENS}")
    if not 0 <= temperature <= HOTTEST:
        raise ConfigError(f"--temperature={temperature} must be between 0 and {HOTTEST:g}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top_p={top_p} must be above 0 and at most 1")


def _round_up(length: int) -> int:
    """Returns the next multiple of 32."""
    num_blocks = -(-length // 32)
    return num_blocks * 32
