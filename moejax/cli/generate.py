"""Continue prompts with a trained model; a single prompt streams to the terminal as it is written.

moejax generate --workdir=runs/tiny_moe --prompt="My fellow citizens" --prompt="The war" --temperature=0.8 --top_p=0.95
"""

import json
import sys

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import define_json, define_workdir, read_workdir, refuse_several_processes
from moejax.inference.generate import generate, generate_text
from moejax.inference.load import load_run


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_json(values)
    flags.DEFINE_multi_string("prompt", None, "text to continue; repeat it for a batch", flag_values=values)
    flags.DEFINE_integer("max_tokens", 200, "tokens to add at most", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 always takes the most probable token", flag_values=values)
    flags.DEFINE_float("top_p", 0.95, "sample from the most probable tokens that reach this mass", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Prints prompts and their continuations."""
    refuse_several_processes("generate")
    prompts = values.prompt or [""]
    loaded = load_run(read_workdir(values), values.step)
    sampling = {
        "max_tokens": values.max_tokens,
        "temperature": values.temperature,
        "top_p": values.top_p,
        "seed": values.seed,
    }
    if len(prompts) == 1 and not values.json:
        _stream(loaded.model, loaded.tokenizer, prompts[0], sampling)
        return
    texts = generate_text(loaded.model, loaded.tokenizer, prompts, **sampling)
    results = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    if values.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print("\n\n---\n\n".join(result["prompt"] + result["text"] for result in results))


def _stream(model, tokenizer, prompt: str, sampling: dict) -> None:
    """Writes text as soon as it is certain: a character may be spread over several tokens."""
    ids: list[int] = []
    written = ""
    for (token,) in generate(model, tokenizer, [prompt], **sampling):
        if not ids:
            sys.stdout.write(prompt)  # not before compilation, during which there is something to log
        if token is None:
            break
        ids.append(token)
        text = tokenizer.decode(ids).rstrip("\ufffd")
        if text.startswith(written):
            sys.stdout.write(text[len(written) :])
            sys.stdout.flush()
            written = text
    print()
