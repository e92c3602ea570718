"""Measures what longer rows cost, in attention and in train steps.

Rows four times as long, with the same number of tokens, are compared with those of the
configuration, and attention in blocks with attention over all scores.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.benchmarks.step import Step
from moejax.benchmarks.timing import interleave
from moejax.config import Config, ConfigError
from moejax.nn.attention.attend import attend, attend_plainly
from moejax.nn.mask import AttentionMask

LONGER = 4
"""How many times as long the longer rows are."""


def bench_attention(config: Config, repetitions: int) -> dict[str, Any]:
    """Times train steps of both lengths, and the attention of one layer, forward and backward.

    Rows are one document each.

    Raises:
      ConfigError: the batch cannot be divided by 4.
    """
    batch_size = config.train.batch_size
    if batch_size % LONGER:
        raise ConfigError(
            f"train.batch_size={batch_size} must be a multiple of {LONGER}: with as many tokens, "
            f"rows {LONGER} times as long are that much fewer"
        )
    longer = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=LONGER * config.data.seq_len),
        train=dataclasses.replace(config.train, batch_size=batch_size // LONGER),
    )
    layers: dict[str, Callable[[], Any]] = {}
    for name, one in (("short", config), ("long", longer)):
        layers[f"{name} rows"] = _layer(one, attend)
        layers[f"{name} scores"] = _layer(one, attend_plainly)
    # Layers and steps apart: steps take much memory, and layers would wait for theirs.
    times = interleave(layers, repetitions)
    times |= interleave({"short step": Step(config), "long step": Step(longer)}, repetitions)
    ms = {name: one.median_ms for name, one in times.items()}
    return {
        "step_ratio_long_to_short": round(ms["long step"] / ms["short step"], 3),
        "attention_ratio_to_all_scores_short": round(ms["short rows"] / ms["short scores"], 3),
        "attention_ratio_to_all_scores_long": round(ms["long rows"] / ms["long scores"], 3),
        **{f"{name.replace(' ', '_')}_ms": round(median, 2) for name, median in ms.items()},
        "short_positions": config.data.seq_len,
        "long_positions": longer.data.seq_len,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def _layer(config: Config, attention: Callable[..., jax.Array]) -> Callable[[], Any]:
    """Returns attention and its gradients for random inputs of one layer, as one call."""
    rows = (config.train.batch_size, config.data.seq_len)
    num_heads, num_kv_heads = config.attention.num_heads, config.attention.num_kv_heads
    query_key, key_key, value_key, output_key = jax.random.split(jax.random.key(0), 4)

    def normal(key: jax.Array, heads: int) -> jax.Array:
        return jax.random.normal(key, (*rows, heads, config.head_dim), config.model.compute_dtype)

    arrays = [
        normal(query_key, num_heads),
        normal(key_key, num_kv_heads),
        normal(value_key, num_kv_heads),
    ]
    output_gradient = normal(output_key, num_heads)
    segments_BL = jnp.ones(rows, jnp.int32)

    @jax.jit
    def gradients(arrays, output_gradient, segments_BL):
        def weighted_sum(arrays):
            mask = AttentionMask.within_rows(segments_BL)
            weighted = attention(*arrays, mask) * output_gradient
            return weighted.astype(jnp.float32).sum()

        return jax.grad(weighted_sum)(arrays)

    return lambda: gradients(arrays, output_gradient, segments_BL)
