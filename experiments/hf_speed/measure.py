"""Is a released model as fast here as in the reference implementation, on the same machine?

    python experiments/hf_speed/measure.py --reference_python=ENV/bin/python

ENV has torch and transformers. A random Mixtral is written to a temporary folder, both sides load
it, and take turns. Printed are medians, and the ratio of ours to the reference's.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import resolve
from moejax.inference.generate import decode, prefill
from moejax.inference.layered import LayeredDecoder
from moejax.inference.sampling import Sampling
from moejax.interop.hf.load import load_model
from moejax.interop.hf.save import save_model
from moejax.models import Decoder

MODEL = {
    "model": {
        "num_layers": 8,
        "d_model": 512,
        "vocab_size": 32_000,
        "tied_embeddings": False,
        "embedding_multiplier": 1.0,
    },
    "attention": {"num_heads": 8, "num_kv_heads": 2},
    "moe": {"num_experts": 8, "top_k": 2, "d_expert": 1792, "z_weight": 0.0},
    "data": {"tokenizer": "bytes", "seq_len": 512},
}
"""A Mixtral of an eighth of the width: 216 million parameters."""

LENGTH = 256
"""Tokens of a row of a forward pass."""

PROMPT, STEPS = 64, 32
"""Tokens of a prompt, and greedy steps after it that are timed."""

BATCHES = (1, 16)


class Reference:
    """The reference implementation in a process of its own."""

    def __init__(self, python: str, folder: Path):
        script = Path(__file__).with_name("reference.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def __call__(self, *command: object) -> float:
        """Returns the seconds of a command."""
        self._process.stdin.write(" ".join(map(str, command)) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the reference ended; its errors are above")
        return line


class Ours:
    """The same model here."""

    def __init__(self, folder: Path):
        model = load_model(folder)
        graphdef, state = nnx.split(model)

        @jax.jit
        def forward(state, tokens_BL):
            ones_BL = jnp.ones_like(tokens_BL)
            positions_BL = jnp.cumsum(ones_BL, axis=1) - 1
            model = nnx.merge(graphdef, state)
            hidden_BLD, _ = model(tokens_BL, ones_BL, positions_BL)
            return model.logits(hidden_BLD)

        self._forward = lambda tokens_BL: forward(state, tokens_BL)
        self._decoder = LayeredDecoder(model)
        self._rng = np.random.default_rng(0)

    def __call__(self, kind: str, batch: int, length: int, steps: int = 0) -> float:
        """Returns the seconds of a command, as `reference.py` does."""
        vocab_size = self._decoder.config.vocab_size
        tokens_BL = jnp.asarray(self._rng.integers(0, vocab_size, (batch, length)), jnp.int32)
        if kind == "forward":
            return _seconds(lambda: self._forward(tokens_BL))
        sampling = Sampling.from_settings(0.0, 1.0, jax.random.split(jax.random.key(0), batch))
        lengths_B = jnp.full(batch, length, jnp.int32)
        cache = self._decoder.init_cache(batch, length + steps)
        state = prefill(self._decoder, tokens_BL, lengths_B, cache, sampling)
        jax.block_until_ready(state)

        def greedy_steps():
            next_B, positions_B, cache = state
            for _ in range(steps):
                next_B, positions_B, cache = decode(
                    self._decoder, next_B, positions_B, cache, sampling
                )
            return next_B

        return _seconds(greedy_steps)


def _seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference_python", required=True)
    parser.add_argument("--repetitions", type=int, default=7)
    flags = parser.parse_args()
    commands = []
    for batch in BATCHES:
        commands += [("forward", batch, LENGTH), ("decode", batch, PROMPT, STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixtral"
        save_model(Decoder(resolve(MODEL), rngs=nnx.Rngs(params=0)), path, "mixtral")
        sides = {"ours": Ours(path), "reference": Reference(flags.reference_python, path)}
        seconds = {(side, command): [] for side in sides for command in commands}
        for repetition in range(flags.repetitions + 1):
            for command in commands:
                for name, side in sides.items():
                    taken = side(*command)
                    if repetition:  # the first one compiles
                        seconds[name, command].append(taken)
        sides["reference"].close()
    results = {}
    for command in commands:
        ours, reference = (statistics.median(seconds[name, command]) for name in sides)
        results[" ".join(map(str, command))] = {
            "ours_s": round(ours, 4),
            "reference_s": round(reference, 4),
            "ratio": round(ours / reference, 3),
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
