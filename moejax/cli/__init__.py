"""The `moejax` command: one file per verb.

A verb module has a docstring (its help), `define(flag_values, arguments)` and `run(flag_values, rest)`. A user's
mistake is one line on standard error and exit code 2; `--debug` shows the traceback.
"""

import difflib
import importlib
import logging
import re
import sys
import traceback
from collections.abc import Sequence

from absl import flags
from absl.flags import FlagValues

from moejax.config import check_key, read_value

VERBS = {
    "train": "train a configuration in a run directory, or continue it",
    "eval": "evaluate a run's checkpoint on the validation split",
    "generate": "continue prompts with a trained model",
    "report": "write a run's report.html, or compare several runs in one page",
    "view": "show runs in a browser while they train",
    "sweep": "train many configurations: plan, packs, searches, workers, report",
    "counterfactuals": "evaluate a checkpoint under changed routing: fewer experts, without one, swapped, random",
    "bench": "measure: layer, decode, compiled, compiled_step, tune, step, telemetry, packed, compile, import",
    "placement": "show how even devices are loaded, and would be with experts in other places",
    "config": "show every setting of a recipe: value, default, range, meaning",
    "doctor": "print versions, devices and kernels, and check that they work",
}

PROCESSES = "moejax.training.processes"


class UsageError(ValueError):
    """The command line is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: what follows `moejax`; the process's arguments by default.

    Returns:
      The exit code: 0, 1 for a failed run, 2 for a user's mistake, 130 when interrupted. (A watchdog ends a hanging
      step with 3.) One of several processes exits here if it fails, without waiting for the others.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    is_debug = "--debug" in argv
    _set_up_logging(is_debug)
    code = 1
    try:
        code = _run_and_explain(argv[0], [argument for argument in argv[1:] if argument != "--debug"], is_debug)
    except Exception:
        if not _has_others():
            raise
        traceback.print_exc()
    if code and _has_others():
        sys.modules[PROCESSES].leave_at_once(code)
    return code


def _run_and_explain(verb: str, arguments: list[str], is_debug: bool) -> int:
    """Runs a verb; says what a user needs to know of an error and passes on others."""
    try:
        _run_verb(verb, arguments)
    except KeyboardInterrupt:
        print("moejax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        return 1
    except Exception as error:
        if is_debug or not _is_expected(error):
            raise
        print(f"moejax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | flags.Error | OSError) else 1
    return 0


def _has_others() -> bool:
    """Whether this is one of several processes, which must not wait for it; loads nothing."""
    return PROCESSES in sys.modules and sys.modules[PROCESSES].has_others()


def _run_verb(verb: str, arguments: list[str]) -> None:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        raise UsageError(f"{verb} is not a verb of moejax; the nearest is {near}; see moejax --help")
    module = importlib.import_module(f"moejax.cli.{verb}")
    values = FlagValues()
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    module.define(values, arguments)
    if any(argument in ("-h", "--help", "--help=true") for argument in arguments):
        description = (module.__doc__ or "").strip()
        print(f"moejax {verb}: {description}\n\nFlags:\n{_flag_help(values)}")
        return
    _check_config_keys(arguments)
    try:
        rest = values(["moejax", *arguments])
    except (AttributeError, KeyError, TypeError, OSError) as error:  # what config files and overrides raise
        raise UsageError(str(error)) from error
    module.run(values, rest[1:])


def _check_config_keys(arguments: Sequence[str]) -> None:
    """Names the nearest key for an override of a key that does not exist, and what kind of value a key has."""
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)(=(.*))?", argument, re.DOTALL)
        if match:
            check_key(match.group(1))
        if match and match.group(2):
            read_value(match.group(1), match.group(3))


def _is_expected(error: Exception) -> bool:
    """Whether a message is all the user needs: our own errors and absl's about flags."""
    own = type(error).__module__.startswith("moejax.")
    return own or isinstance(error, flags.Error | OSError)


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<16}{text}" for verb, text in VERBS.items())
    return f"usage: moejax VERB [--flag=value ...]\n\nVerbs:\n{verbs}\n\nmoejax VERB --help lists a verb's flags."


def _flag_help(values: FlagValues) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        if name == flag.name:
            default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _set_up_logging(is_debug: bool) -> None:
    """Our messages to standard error, plainly; other libraries' warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("moejax").setLevel(logging.DEBUG if is_debug else logging.INFO)
    for library in ("absl", "orbax", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING if is_debug else logging.ERROR)
