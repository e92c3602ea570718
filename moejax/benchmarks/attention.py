"""What longer rows cost: attention over all scores, and a train step with as many tokens in rows four times as long."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.benchmarks.step import Step
from moejax.benchmarks.timing import interleave
from moejax.config import Config, ConfigError
from moejax.nn.attention.grouped_query import attend, attend_in_rows, row_mask

LONGER = 4


def bench_attention(config: Config, repetitions: int) -> dict[str, Any]:
    """Times train steps of both lengths, and one layer's attention, forward and backward, with that over all scores.

    Rows are one document each.

    Raises:
      ConfigError: the batch cannot be divided by 4.
    """
    if config.train.batch_size % LONGER:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} must be a multiple of {LONGER}: with as many tokens, rows "
            f"{LONGER} times as long are that much fewer"
        )
    longer = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=LONGER * config.data.seq_len),
        train=dataclasses.replace(config.train, batch_size=config.train.batch_size // LONGER),
    )
    layers: dict[str, Callable[[], Any]] = {}
    for name, one in (("short", config), ("long", longer)):
        layers[f"{name} rows"] = _layer(
            one, lambda q, k, v, segments: attend_in_rows(q, k, v, segments)
        )
        layers[f"{name} scores"] = _layer(
            one, lambda q, k, v, segments: attend(q, k, v, row_mask(segments))
        )
    times = interleave(
        layers, repetitions
    )  # apart: among steps, which take much memory, both would wait for theirs
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
    """Attention and its gradients for random queries, keys and values of one layer of a batch."""
    shape = (config.train.batch_size, config.data.seq_len)
    heads, dtype = (config.model.num_heads, config.model.num_kv_heads), config.model.compute_dtype
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (
        heads[0],
        heads[1],
        heads[1],
        heads[0],
    )  # of queries, keys, values and the gradient of the output
    *arrays, weight = (
        jax.random.normal(key, (*shape, num, config.head_dim), dtype)
        for key, num in zip(keys, sizes, strict=True)
    )
    segments_BL = jnp.ones(shape, jnp.int32)

    @jax.jit
    def gradients(arrays, weight, segments_BL):
        return jax.grad(
            lambda arrays: (attention(*arrays, segments_BL) * weight).astype(jnp.float32).sum()
        )(arrays)

    return lambda: gradients(arrays, weight, segments_BL)
