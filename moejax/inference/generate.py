"""Autoregressive sampling: one pass over the prompts, then a token at a time with cached keys and values.

Prompts of a batch may differ in length: they are padded on the right, and each sequence keeps its own position. What a
padded position wrote to the cache is overwritten before anything sees it.
"""

import functools
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import ROUTER_RULES, ConfigError
from moejax.data import Tokenizer
from moejax.models import Decoder
from moejax.seeds import check_seed

MAX_TOKENS = 65_536
"""The cache holds keys and values of every position at once."""

log = logging.getLogger("moejax")


def generate(
    model: Decoder,
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
      model: the decoder; routing is dropless, so that a sequence does not depend on the others of its batch, unless
        `moe.eval_capacity_factor` limits it.
      tokenizer: the run's own.
      prompts: texts; each is preceded by the begin-of-document token.
      max_tokens: how many tokens to add at most.
      temperature: logits are divided by it; 0 takes the most probable token.
      top_p: sample from the smallest set of most probable tokens whose probability reaches this.
      seed: of the sampling; sequence i draws from its own stream, so that it does not depend on the others.

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
        log.warning("beyond %d tokens, the length of training rows, the model is on unknown ground", trained_length)
    longest = _round_up(int(lengths.max()))  # few distinct lengths, so few compilations
    blind = sorted({moe.router for moe in model.config.moe_runs if not ROUTER_RULES[moe.router].takes_capacity})
    if blind:
        log.warning("moe.router=%s looks at later tokens, which do not exist yet: text will be poor", ", ".join(blind))
    if any(moe.eval_capacity_factor > 0 for moe in model.config.moe_runs):
        log.warning("moe.eval_capacity_factor drops tokens here as well: what is written depends on the batch")
    tokens_BL = np.full((len(rows), longest), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens_BL, rows, strict=True):
        row[: len(ids)] = ids
    graphdef, state = nnx.split(model)
    cache = model.init_cache(len(rows), _round_up(longest + max_tokens))
    keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(rows)))
    sampling = (jnp.float32(temperature), jnp.float32(top_p), keys_B)
    next_B, cache = _prefill(graphdef, state, tokens_BL, lengths, cache, sampling)
    is_done_B = np.zeros(len(rows), bool)
    for step in range(max_tokens):
        ids_B = np.asarray(next_B)
        is_done_B |= ids_B == tokenizer.eos_id
        yield [None if done else int(token) for token, done in zip(ids_B, is_done_B, strict=True)]
        if is_done_B.all() or step + 1 == max_tokens:
            return
        next_B, cache = _decode(graphdef, state, next_B, jnp.asarray(lengths + step), cache, sampling)


def generate_text(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], **sampling) -> list[str]:
    """Whole continuations, without the prompts; see `generate`."""
    ids: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, tokenizer, prompts, **sampling):
        for row, token in zip(ids, step, strict=True):
            if token is not None:
                row.append(token)
    return [tokenizer.decode(row) for row in ids]


def sample(
    logits_BV: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    keys_B: jax.Array,
    positions_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Draws one token per sequence from the nucleus of its distribution.

    Args:
      logits_BV: float32.
      temperature: 0 takes the most probable token.
      top_p: mass of the nucleus; its most probable token always belongs to it.
      keys_B: one key per sequence.
      positions_B: folded into the keys, so that each position has its own draw.

    Source: Holtzman et al. 2020 (nucleus sampling, section 3.1).
    """
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    nucleus_BV = jnp.where((mass_before_BV < top_p) | (mass_before_BV == 0), sorted_BV, -jnp.inf)
    draw_keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    drawn_B = jax.vmap(jax.random.categorical)(draw_keys_B, nucleus_BV)
    chosen_B = jnp.where(temperature > 0, drawn_B, 0)
    return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(graphdef, state, tokens_BL, lengths_B, cache, sampling):
    model, (temperature, top_p, keys_B) = nnx.merge(graphdef, state), sampling
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    is_token_BL = positions_BL < lengths_B[:, None]
    logits_BLV, cache = model.extend(tokens_BL, positions_BL, cache, is_token_BL)
    last_BV = jnp.take_along_axis(logits_BLV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return sample(last_BV, temperature, top_p, keys_B, lengths_B), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode(graphdef, state, tokens_B, positions_B, cache, sampling):
    model, (temperature, top_p, keys_B) = nnx.merge(graphdef, state), sampling
    logits_B1V, cache = model.extend(tokens_B[:, None], positions_B[:, None], cache)
    return sample(logits_B1V[:, 0], temperature, top_p, keys_B, positions_B + 1), cache


def _check(prompts, max_tokens, temperature, top_p) -> None:
    if not prompts:
        raise ConfigError("--prompt is missing; give at least one")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--max_tokens={max_tokens} must be between 1 and {MAX_TOKENS}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature={temperature} must be at least 0")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top_p={top_p} must be above 0 and at most 1")


def _round_up(length: int) -> int:
    return -(-length // 32) * 32
