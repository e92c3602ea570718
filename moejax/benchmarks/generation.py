"""Times decode steps of a batch, by how tokens are drawn, with random weights and prompts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.benchmarks.timing import interleave, rounded
from moejax.config import Config
from moejax.inference.generate import decode, prefill
from moejax.inference.layered import LayeredDecoder
from moejax.inference.sampling import Sampling
from moejax.models import Decoder

SEQUENCES = 16
"""Of a batch."""

PROMPT = 16
"""Tokens of each prompt."""

STEPS = 64
"""Decode steps that are timed together."""

DRAWN = {"greedy": (0.0, 1.0), "all": (1.0, 1.0), "nucleus": (1.0, 0.9)}
"""Temperature and top-p of each way to draw a token."""


def bench_generate(config: Config, repetitions: int) -> dict[str, Any]:
    """Times decode steps; ratios are to those that take the most probable token."""
    model = Decoder(config, rngs=nnx.Rngs(params=config.train.seed))
    decoder = LayeredDecoder(model)
    writers = {name: _Writer(decoder, *drawn) for name, drawn in DRAWN.items()}
    times = interleave(writers, repetitions)
    ms = {name: one.median_ms for name, one in times.items()}
    tokens = SEQUENCES * STEPS
    tokens_per_s = {f"{name}_tokens_per_s": round(1e3 * tokens / ms[name]) for name in DRAWN}
    ms_of_step = {f"{name}_ms_of_step": round(ms[name] / STEPS, 3) for name in DRAWN}
    quartiles_ms = [quartile / STEPS for quartile in times["greedy"].quartiles_ms]
    return {
        "ratio_all_to_greedy": round(ms["all"] / ms["greedy"], 3),
        "ratio_nucleus_to_greedy": round(ms["nucleus"] / ms["greedy"], 3),
        **tokens_per_s,
        **ms_of_step,
        "greedy_quartiles_ms_of_step": rounded(quartiles_ms, 3),
        "sequences": SEQUENCES,
        "prompt_tokens": PROMPT,
        "steps": STEPS,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


class _Writer:
    """Writes `STEPS` tokens after each prompt when called, in place of those of the last call."""

    def __init__(self, decoder: LayeredDecoder, temperature: float, top_p: float):
        self._decoder = decoder
        keys_B = jax.random.split(jax.random.key(1), SEQUENCES)
        self._sampling = Sampling.from_settings(temperature, top_p, keys_B)
        prompts_BL = jax.random.randint(
            jax.random.key(0),
            (SEQUENCES, PROMPT),
            0,
            decoder.config.num_token_ids,
            jnp.int32,
        )
        lengths_B = jnp.full(SEQUENCES, PROMPT, jnp.int32)
        empty_cache = decoder.init_cache(SEQUENCES, PROMPT + STEPS)
        self._first_B, self._first_positions_B, self._cache = prefill(
            decoder,
            prompts_BL,
            lengths_B,
            empty_cache,
            self._sampling,
        )

    def __call__(self) -> jax.Array:
        """Returns the last tokens."""
        tokens_B, positions_B = self._first_B, self._first_positions_B
        for _ in range(STEPS):
            tokens_B, positions_B, self._cache = decode(
                self._decoder,
                tokens_B,
                positions_B,
                self._cache,
                self._sampling,
            )
        return tokens_B
