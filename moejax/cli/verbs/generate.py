"""Continue prompts with a trained model; a single prompt streams to the terminal as it is written.

  moejax generate --workdir=runs/tiny_moe --prompt="The people of the United States"
  moejax generate --workdir=runs/tiny_moe --prompt="The people" --prompt="The war"
  moejax generate --hf=mixtral-8x7b-instruct --chat --prompt="Who was the first president?"

The defaults of --temperature and --top_p suit small models: at 1.0 a few million parameters invent
many words, at 0 they repeat themselves. A released model's own defaults come before them. One that
came without a tokenizer takes and gives token ids: --prompt="5 17 3".
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.cli.errors import UsageError
from moejax.cli.options import (
    define_average,
    define_hf,
    define_json,
    define_seed,
    define_workdir,
    read_hf,
    read_prompts,
    read_workdir,
    refuse_several_processes,
)
from moejax.compilation_cache import keep_compilation_cache
from moejax.data.tokenizers import ReleasedTokenizer, TextStream
from moejax.inference.generate import Prompt, generate, generate_text, prompt_ids
from moejax.inference.load import LoadedRun, load_run
from moejax.interop.hf.released import load_released
from moejax.interop.hf.text.folder import ReleasedText, find_text
from moejax.interop.hf.text.generation import GenerationDefaults
from moejax.strict_json import to_json
from moejax.training.run_directory.layout import RELEASED

MAX_TOKENS = 200
TEMPERATURE = 0.7
TOP_P = 0.9


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_hf(values)
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
        None,
        f"0 always takes the most probable token; default {TEMPERATURE}, or the model's own",
        flag_values=values,
    )
    flags.DEFINE_float(
        "top_p",
        None,
        f"sample from the most probable tokens that reach this mass; default {TOP_P}, or the "
        "model's own",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top_k",
        None,
        "sample from this many most probable tokens at most, 0 for all; default 0, or the model's "
        "own",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "chat",
        False,
        "prompts are a user's messages to a model with a chat template",
        flag_values=values,
    )
    define_seed(values, "seed", "of the sampling")
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)
    define_average(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Prints prompts and their continuations."""
    refuse_several_processes("generate")
    keep_compilation_cache()
    texts = read_prompts(values) or [""]
    loaded, released = _load(values)
    prompts: list[Prompt] = list(texts)
    if values.chat:
        prompts = [_message_ids(released, text) for text in texts]
    sampling = _sampling(values, loaded, released, prompts)
    if len(prompts) == 1 and not values.json:
        _stream(loaded, prompts[0], "" if values.chat else texts[0], sampling)
        return
    answers = generate_text(loaded.model, loaded.tokenizer, prompts, **sampling)
    results = list(zip(texts, answers, strict=True))
    if values.json:
        rows = [{"prompt": prompt, "text": text} for prompt, text in results]
        print(to_json(rows, indent=2))
    else:
        print("\n\n---\n\n".join(prompt + text for prompt, text in results))


def _load(values: FlagValues) -> tuple[LoadedRun, ReleasedText | None]:
    """Returns the model of `--hf` or `--workdir`, and its text side if it was released."""
    folder = read_hf(values)
    if folder is None:
        workdir = read_workdir(values)
        loaded = load_run(workdir, values.step, average=values.average)
        folder = workdir / RELEASED
    elif values.step is not None or values.average:
        name = "average" if values.step is None else "step"
        raise UsageError(f"--{name}={values[name].value} goes with --workdir only; leave it out")
    else:
        loaded = load_released(folder)
    released = find_text(folder)
    if released is not None and isinstance(loaded.tokenizer, ReleasedTokenizer):
        # Of a run that is its own copy, of which the checkpoint has a digest.
        tokenizer = loaded.tokenizer.with_ends(released.generation.end_ids)
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
        released = dataclasses.replace(released, tokenizer=tokenizer)
    return loaded, released


def _message_ids(released: ReleasedText | None, text: str) -> list[int]:
    """Returns the ids of a chat of one message, after which the answer follows."""
    if released is None:
        raise UsageError(
            "--chat needs a released model with a tokenizer and a chat template; leave it out, and "
            "the prompt is continued"
        )
    return released.apply_chat_template([{"role": "user", "content": text}])


def _sampling(
    values: FlagValues,
    loaded: LoadedRun,
    released: ReleasedText | None,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Returns what is given, or else the model's defaults, or else ours."""
    own = released.generation if released else GenerationDefaults()
    max_tokens = _first_given(values.max_tokens, own.max_tokens)
    if max_tokens is None:
        max_tokens = _default_length(loaded, prompts)
    return {
        "max_tokens": max_tokens,
        "temperature": _first_given(values.temperature, own.temperature, TEMPERATURE),
        "top_p": _first_given(values.top_p, own.top_p, TOP_P),
        "top_k": _first_given(values.top_k, own.top_k, 0),
        "seed": values.seed,
    }


def _first_given(*values: Any) -> Any:
    """Returns the first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def _default_length(loaded: LoadedRun, prompts: Sequence[Prompt]) -> int:
    """Returns how many tokens to add: as many as fit a training row, if the prompts leave room."""
    lengths = [len(prompt_ids(loaded.tokenizer, prompt)) for prompt in prompts]
    room = loaded.config.data.seq_len - max(lengths)
    if room <= 0:
        return MAX_TOKENS
    return min(MAX_TOKENS, room)


def _stream(loaded: LoadedRun, prompt: Prompt, shown: str, sampling: dict[str, Any]) -> None:
    """Writes text as soon as it is certain: a character may be spread over several tokens."""
    stream = TextStream(loaded.tokenizer, prompt_ids(loaded.tokenizer, prompt))
    steps = generate(loaded.model, loaded.tokenizer, [prompt], **sampling)
    for number, (token,) in enumerate(steps):
        if number == 0:  # after compilation, during which there is something to log
            sys.stdout.write(shown)
        if token is None:
            break
        sys.stdout.write(stream.add(token))
        sys.stdout.flush()
    print(stream.finish())
