"""The `moejax` command: one file per verb.

A verb module has a docstring (its help), `define(flag_values, arguments)` and `run(flag_values,
rest)`. A user's mistake is one line on standard error and exit code 2; `--debug` shows the
traceback. Nothing that is typed is dropped: flags that a verb does not have, flags given twice and
words that mean nothing to it are refused before it begins.
"""

import faulthandler
import importlib
import io
import logging
import sys
import traceback
from collections.abc import Sequence

from absl import flags
from absl.flags import FlagValues

from moejax.cli.arguments import check_arguments, config_first, plain_errors, verb_first
from moejax.cli.errors import UsageError as UsageError
from moejax.cli.memory import explain_memory, warn_of_small_limit
from moejax.cli.printable import PrintableFormatter, printable
from moejax.config import Config, leaves, nearest
from moejax.training.multihost.signals import SignalWatch

VERBS = {
    "train": "train a configuration in a run directory, or continue it",
    "eval": "evaluate a run's checkpoint on the validation split",
    "generate": "continue prompts with a trained model",
    "inspect": "show how a checkpoint or a released model routes text: load, traces, experts",
    "convert": "convert a released model to a run directory, or back; prove that it is the same",
    "report": "write a run's report.html, or compare several runs in one page",
    "view": "show runs in a browser while they train",
    "sweep": "train many configurations: plan, packs, searches, workers, report",
    "ladder": "train arms at several budgets of compute, fit their laws, judge candidates",
    "coordcheck": "check that activations keep their size as a model grows",
    "counterfactuals": "evaluate a checkpoint under changed routing: fewer experts, without one, "
    "swapped, random",
    "bench": "measure: layer, decode, compiled, compiled_step, step, optimizers, telemetry, "
    "packed, compile, import",
    "placement": "show how even devices are loaded, and would be with experts in other places",
    "config": "show every setting of a recipe: value, default, range, meaning",
    "doctor": "print versions, devices and kernels, and check that they work",
}

WITH_WORDS = ("report", "sweep", "ladder", "bench")
"""Verbs to which words that are no flags mean something; the others refuse them."""

HELP = ("-h", "-help", "--help", "--help=true", "--helpshort", "--helpfull")

PROCESSES = "moejax.training.multihost.processes"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: what follows `moejax`; the process's arguments by default.

    Returns:
      The exit code: 0, 1 for a failed run, 2 for a user's mistake, 130 when interrupted. (A
      watchdog ends a hanging step with 3.) One of several processes exits here if it fails, without
      waiting for the others.
    """
    _write_any_text()
    given = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in given
    words = _help_last([word for word in given if word != "--debug"])
    if not words or words[0] in HELP:
        print(_overview())
        return 0 if given else 2
    _set_up_logging(is_debug)
    warn_of_small_limit()
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # a fault in a library leaves at least its stack
    code = 1
    try:
        code = _run_and_explain(words[0], words[1:], is_debug)
    except Exception:
        if not _has_others():
            raise
        sys.modules[PROCESSES].await_word_of_others()
        traceback.print_exc()
    if code and _has_others():
        sys.modules[PROCESSES].leave_at_once(code)
    return code


def _help_last(words: list[str]) -> list[str]:
    """Returns `VERB --help ...` for `help VERB ...`, and other words as they are."""
    if not words:
        return words
    first, *others = words
    if first == "help" or (first in HELP and others):
        return [*others[:1], "--help", *others[1:]]
    return words


def _write_any_text() -> None:
    """Lets standard output and error write characters that the terminal lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run_and_explain(verb: str, arguments: list[str], is_debug: bool) -> int:
    """Runs a verb; says what a user needs to know of an error and passes on others."""
    try:
        with SignalWatch():
            _run_verb(verb, arguments)
    except KeyboardInterrupt:
        print("moejax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        return 1
    except Exception as error:
        no_memory = explain_memory(error)
        if no_memory and not is_debug:
            print(f"moejax: {printable(no_memory)}", file=sys.stderr)
            return 1
        if is_debug or not _is_expected(error):
            raise
        message = " ".join(str(error).split())
        print(f"moejax: {printable(message)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | flags.Error | OSError) else 1
    return 0


def _has_others() -> bool:
    """Whether this is one of several processes, which must not wait for it; imports nothing."""
    return PROCESSES in sys.modules and sys.modules[PROCESSES].has_others()


def _run_verb(verb: str, arguments: list[str]) -> None:
    """Parses the flags of a verb and runs it, or prints its help."""
    if verb not in VERBS:
        raise UsageError(_about_verb(verb, arguments))
    module = importlib.import_module(f"moejax.cli.verbs.{verb}")
    values = FlagValues()
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    arguments = config_first(arguments)
    asked = [argument for argument in arguments if argument in HELP]
    with plain_errors(values):
        module.define(values, [] if asked else arguments)
        if asked:
            print(_help(verb, module.__doc__ or "", values, is_full="--helpfull" in asked))
            return
        check_arguments(verb, values, arguments, verb in WITH_WORDS)
        try:
            rest = values(["moejax", *arguments])
        # What overrides of a recipe raise.
        except (AttributeError, KeyError, TypeError, OSError) as error:
            raise UsageError(str(error)) from error
    module.run(values, rest[1:])


def _about_verb(word: str, arguments: list[str]) -> str:
    """Returns why the first word is refused, which is no verb."""
    if word.startswith("-"):
        return verb_first([word, *arguments], list(VERBS))
    if word.endswith(".py"):
        return f"{word} is not a verb of moejax; write moejax train --config={word}"
    if word == "version":
        return "version is not a verb of moejax; moejax doctor prints the versions"
    near = nearest(word, VERBS)
    return f"{word} is not a verb of moejax; the nearest is {near}; see moejax --help"


def _is_expected(error: Exception) -> bool:
    """Whether a message is all the user needs: our own errors and absl's about flags."""
    own = type(error).__module__.startswith("moejax.")
    return own or isinstance(error, flags.Error | OSError)


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<16}{text}" for verb, text in VERBS.items())
    return (
        f"usage: moejax VERB [--flag=value ...]\n\nVerbs:\n{verbs}\n\n"
        "moejax VERB --help lists a verb's flags."
    )


def _help(verb: str, description: str, values: FlagValues, *, is_full: bool) -> str:
    """Returns what a verb does, and its flags.

    Of settings it says where they are listed, or with `is_full` lists each with its default.
    """
    text = f"moejax {verb}: {description.strip()}\n\nFlags:\n{_flag_help(values)}"
    if "config" not in values:
        return text
    if not is_full:
        where = f"moejax config shows them, moejax {verb} --helpfull lists all"
        return f"{text}\n\nSettings, --config.section.leaf=value: {where}."
    title = "\nSettings and their defaults, which the recipe changes:"
    return "\n".join([text, title, *_settings()])


def _settings() -> list[str]:
    """Returns a line for each setting with its default."""
    defaults = Config()
    lines = []
    for key, _ in leaves():
        section, _, name = key.partition(".")
        default = getattr(getattr(defaults, section), name)
        lines.append(f"  --config.{key}={default}")
    return lines


def _flag_help(values: FlagValues) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        if name != flag.name:  # its short form
            continue
        has_default = flag.default not in (None, "", False)
        default = f" (default: {flag.default})" if has_default else ""
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _set_up_logging(is_debug: bool) -> None:
    """Logs our messages to standard error as plain lines.

    Of the libraries that save a run, warnings are logged; of other libraries errors only.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.root.handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
        if not is_debug:
            handler.addFilter(_is_no_failed_thread)
    logging.getLogger("moejax").setLevel(logging.DEBUG if is_debug else logging.INFO)
    for library in ("absl", "orbax"):  # checkpoints are saved by orbax, which logs through absl
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("jax").setLevel(logging.WARNING if is_debug else logging.ERROR)


def _is_no_failed_thread(record: logging.LogRecord) -> bool:
    """Whether a record is not the traceback of a failed thread or task of orbax.

    Those are left out: `Checkpoints` raises the same error.
    """
    is_task = record.name == "asyncio" and "orbax" in record.getMessage()
    is_thread = record.name == "absl"
    return not (record.exc_info and (is_task or is_thread))
