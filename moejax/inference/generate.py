"""Autoregressive sampling: a pass over the prompts, then a token at a time with a key/value cache.

Prompts of a batch may differ in length: they are padded on the right, and each sequence keeps its
own position. What a padded position wrote to the cache is overwritten before anything attends to
it.
"""

import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moejax.config import ROUTER_RULES, Config, ConfigError, MoeConfig
from moejax.data import Tokenizer
from moejax.data.tokenizers import continuation
from moejax.inference.layered import LayeredDecoder
from moejax.inference.sampling import LARGEST_TOP_K, Sampling, sample
from moejax.models import Decoder
from moejax.nn.attention.cache import Cache
from moejax.seeds import check_seed

MAX_TOKENS = 65_536
"""The cache holds keys and values of every position at once."""

HOTTEST = 1e6
"""The highest temperature.

There all tokens are equally probable, and ids that are no token are still never drawn.
"""

Prompt = str | Sequence[int]
"""A text, or the ids of one, such as a chat's."""

log = logging.getLogger("moejax")


def generate(
    model: Decoder | LayeredDecoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continues prompts, yielding the next token of each as soon as it is known.

    Args:
      model: the decoder. A `Decoder` is converted to a `LayeredDecoder` in each call, which needs
        memory for a second copy of its weights. Routing is dropless, so that a sequence does not
        depend on the others of its batch, unless `moe.eval_capacity_factor` limits it, which is
        logged.
      tokenizer: the run's own.
      prompts: texts or ids; see `prompt_ids`.
      max_tokens: the largest number of tokens to add.
      temperature: logits are divided by it; 0 takes the most probable token.
      top_p: sample from the smallest set of most probable tokens whose probability reaches this.
      top_k: sample from this many most probable tokens, among which `top_p` counts; 0 for all.
      seed: of the sampling; sequence i draws from its own stream, so that it does not depend
        on the others.

    Yields:
      For each step a list with one token id per prompt; None once its document has ended.

    Raises:
      ConfigError: no prompt, or an argument out of range.
    """
    _check(prompts, max_tokens, temperature, top_p)
    if not 0 <= top_k <= LARGEST_TOP_K:
        raise ConfigError(f"--top_k={top_k} must be between 0 and {LARGEST_TOP_K}")
    check_seed("--seed", seed)
    tokens_BL, lengths_B = _pad_prompts(tokenizer, prompts)
    _warn_of_length(model.config, int(lengths_B.max()) + max_tokens)
    _warn_of_lookahead(model.config)
    _warn_of_capacity(model.config)
    decoder = LayeredDecoder(model) if isinstance(model, Decoder) else model
    batch, padded_length = tokens_BL.shape
    cache = decoder.init_cache(batch, _round_up(padded_length + max_tokens))
    sampling = Sampling.from_settings(temperature, top_p, _sequence_keys(seed, batch), top_k)
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
        is_done_B |= np.isin(ids_B, tokenizer.end_ids)
        yield _unfinished(ids_B, is_done_B)
        if is_done_B.all():
            return


def generate_text(
    model: Decoder | LayeredDecoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    **sampling,
) -> list[str]:
    """Returns the complete continuations, without the prompts; see `generate`."""
    steps = list(generate(model, tokenizer, prompts, **sampling))
    texts = []
    for prompt, tokens in zip(prompts, zip(*steps, strict=True), strict=True):
        ids = [token for token in tokens if token is not None]
        texts.append(continuation(tokenizer, prompt_ids(tokenizer, prompt), ids))
    return texts


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Returns the ids of a prompt.

    A text is preceded by the begin-of-document token unless the tokenizer's model was trained
    without it; an empty one is that token.
    """
    if not isinstance(prompt, str):
        return list(prompt) or [tokenizer.bos_id]
    ids = tokenizer.encode(prompt)
    if tokenizer.adds_bos or not ids:
        return [tokenizer.bos_id, *ids]
    return ids


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
    prompts: Sequence[Prompt],
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
    """Returns token ids of the prompts, padded on the right, and their lengths."""
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
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
    prompts: Sequence[Prompt],
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
