"""Steps of decoding a batch, by how tokens are drawn, with weights and prompts drawn at random."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.benchmarks.timing import interleave
from moejax.config import Config
from moejax.inference.generate import Sampling, decode, prefill
from moejax.inference.layered import LayeredDecoder
from moejax.models import Decoder

SEQUENCES, PROMPT, STEPS = 16, 16, 64
"""Of a batch; tokens of a prompt; steps of a turn."""

DRAWN = {"greedy": (0.0, 1.0), "all": (1.0, 1.0), "nucleus": (1.0, 0.9)}
"""Temperature and top-p of each way to draw a token."""


def bench_generate(config: Config, repetitions: int) -> dict[str, Any]:
    """Times decode steps; ratios are to those that take the most probable token."""
    decoder = LayeredDecoder(Decoder(config, rngs=nnx.Rngs(params=config.train.seed)))
    times = interleave(
        {name: _Writer(decoder, *drawn) for name, drawn in DRAWN.items()}, repetitions
    )
    greedy = times["greedy"]
    return {
        "ratio_all_to_greedy": round(times["all"].median_ms / greedy.median_ms, 3),
        "ratio_nucleus_to_greedy": round(times["nucleus"].median_ms / greedy.median_ms, 3),
        **{
            f"{name}_tokens_per_s": round(1e3 * SEQUENCES * STEPS / one.median_ms)
            for name, one in times.items()
        },
        **{f"{name}_ms_of_step": round(one.median_ms / STEPS, 3) for name, one in times.items()},
        "greedy_quartiles_ms_of_step": [round(ms / STEPS, 3) for ms in greedy.quartiles_ms],
        "sequences": SEQUENCES,
        "prompt_tokens": PROMPT,
        "steps": STEPS,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


class _Writer:
    """Writes `STEPS` tokens behind each prompt when called, in place of those of the last call."""

    def __init__(self, decoder: LayeredDecoder, temperature: float, top_p: float):
        self._decoder = decoder
        self._sampling = Sampling.from_settings(
            temperature, top_p, jax.random.split(jax.random.key(1), SEQUENCES)
        )
        ids = (SEQUENCES, PROMPT), 0, decoder.config.num_token_ids
        prompts_BL = jax.random.randint(jax.random.key(0), *ids, jnp.int32)
        lengths_B = jnp.full(SEQUENCES, PROMPT, jnp.int32)
        empty = decoder.init_cache(SEQUENCES, PROMPT + STEPS)
        self._first = prefill(decoder, prompts_BL, lengths_B, empty, self._sampling)
        self._cache = self._first[2]

    def __call__(self) -> jax.Array:
        """The last tokens."""
        tokens_B, positions_B, _ = self._first
        for _ in range(STEPS):
            tokens_B, positions_B, self._cache = decode(
                self._decoder, tokens_B, positions_B, self._cache, self._sampling
            )
        return tokens_B
