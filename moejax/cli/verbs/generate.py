"""Continue prompts with a trained model; a single prompt streams to the terminal as it is written.

  moejax generate --workdir=runs/tiny_moe --prompt="The people of the United States"
  moejax generate --workdir=runs/tiny_moe --prompt="The people" --prompt="The war"

The defaults of --temperature and --top_p suit small models: at 1.0 a few million parameters invent
many words, at 0 they repeat themselves.
"""

import logging
import os
import sys

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import (
    define_json,
    define_seed,
    define_workdir,
    read_workdir,
    refuse_several_processes,
)
from moejax.compilation_cache import keep_compilation_cache
from moejax.data.tokenizers import TextStream
from moejax.inference.generate import generate, generate_text, prompt_ids
from moejax.inference.load import LoadedRun, load_run
from moejax.strict_json import to_json

MAX_TOKENS = 200

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_json(values)
    flags.DEFINE_multi_string(
        "prompt",
        None,
        "text to continue; repeat it for a batch",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_tokens",
        None,
        f"tokens to add at most; default {MAX_TOKENS}, or fewer where training rows were shorter",
        flag_values=values,
    )
    flags.DEFINE_float(
        "temperature",
        0.7,
        "0 always takes the most probable token",
        flag_values=values,
    )
    flags.DEFINE_float(
        "top_p",
        0.9,
        "sample from the most probable tokens that reach this mass",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top_k",
        0,
        "sample from this many most probable tokens at most; 0 for all",
        flag_values=values,
    )
    define_seed(values, "seed", "of the sampling")
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Prints prompts and their continuations."""
    refuse_several_processes("generate")
    keep_compilation_cache()
    prompts = [_as_text(prompt) for prompt in values.prompt or [""]]
    loaded = load_run(read_workdir(values), values.step)
    max_tokens = values.max_tokens
    if max_tokens is None:
        max_tokens = _default_length(loaded, prompts)
    sampling = {
        "max_tokens": max_tokens,
        "temperature": values.temperature,
        "top_p": values.top_p,
        "top_k": values.top_k,
        "seed": values.seed,
    }
    if len(prompts) == 1 and not values.json:
        _stream(loaded.model, loaded.tokenizer, prompts[0], sampling)
        return
    texts = generate_text(loaded.model, loaded.tokenizer, prompts, **sampling)
    results = list(zip(prompts, texts, strict=True))
    if values.json:
        rows = [{"prompt": prompt, "text": text} for prompt, text in results]
        print(to_json(rows, indent=2))
    else:
        print("\n\n---\n\n".join(prompt + text for prompt, text in results))


def _as_text(prompt: str) -> str:
    """Returns a prompt, with bytes that are not UTF-8 replaced and logged."""
    if not _has_bytes(prompt):
        return prompt
    text = os.fsencode(prompt).decode("utf-8", errors="replace")
    log.warning("--prompt has bytes that are not UTF-8, which are replaced: %s", text)
    return text


def _has_bytes(text: str) -> bool:
    """Whether Python has kept bytes of the command line that it could not decode."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _default_length(loaded: LoadedRun, prompts: list[str]) -> int:
    """Returns how many tokens to add: as many as fit a training row, if the prompts leave room."""
    lengths = [len(prompt_ids(loaded.tokenizer, prompt)) for prompt in prompts]
    room = loaded.config.data.seq_len - max(lengths)
    if room <= 0:
        return MAX_TOKENS
    return min(MAX_TOKENS, room)


def _stream(model, tokenizer, prompt: str, sampling: dict) -> None:
    """Writes text as soon as it is certain: a character may be spread over several tokens."""
    stream = TextStream(tokenizer, prompt_ids(tokenizer, prompt))
    for number, (token,) in enumerate(generate(model, tokenizer, [prompt], **sampling)):
        if number == 0:  # after compilation, during which there is something to log
            sys.stdout.write(prompt)
        if token is None:
            break
        sys.stdout.write(stream.add(token))
        sys.stdout.flush()
    print(stream.finish())
