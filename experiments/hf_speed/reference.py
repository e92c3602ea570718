"""Times the reference implementation for `measure.py`, in an environment with torch.

Reads `forward BATCH LENGTH` or `decode BATCH PROMPT STEPS`, a line each, and answers with seconds.
"""

import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Answers commands until the input ends."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        run = {"forward": forward, "decode": decode}[kind]
        print(run(model, *map(int, numbers)), flush=True)


@torch.inference_mode()
def forward(model: torch.nn.Module, batch: int, length: int) -> float:
    """Returns the seconds of a forward pass with logits of all positions."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    start = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - start


@torch.inference_mode()
def decode(model: torch.nn.Module, batch: int, prompt: int, steps: int) -> float:
    """Returns the seconds of greedy steps after a prompt, with the cache of the reference."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt))
    out = model(ids, use_cache=True)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(steps):
        out = model(last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
