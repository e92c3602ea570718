"""Reads `config.json`, which says what a run trains, and checks what readers of a run rely on."""

from collections.abc import Iterator
from typing import Any

from moejax.inspection.runs.errors import RunError, missing_file, unreadable_file
from moejax.training.run_directory.reader import RunDirectory

EXPERT_KINDS = ("num_experts", "num_zero_experts", "num_identity_experts", "num_constant_experts")
KEYS = ("config", "versions", "git_commit", "device", "command", "parameters")
REMEDY = "restore it, or start the run's `moejax train` command again: it rewrites the file"


def read_config_file(run: RunDirectory) -> dict[str, Any]:
    """Returns the object of a `config.json`, with everything of `KEYS` in it.

    Raises:
      RunError: the file is missing or damaged, or may not be read.
    """
    path = run.config
    try:
        facts = run.read_facts()
    except FileNotFoundError as error:
        raise missing_file(path) from error
    except OSError as error:
        raise unreadable_file(path, error) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); {REMEDY}") from error
    known = facts if isinstance(facts, dict) else {}
    missing = [key for key in KEYS if key not in known]
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}; {REMEDY}")
    for complaint in _complaints(facts):
        raise RunError(f"{path}: {complaint}; {REMEDY}")
    return facts


def _complaints(facts: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the entries; later checks rely on what earlier ones found right."""
    for key in ("config", "versions", "parameters"):
        if not isinstance(facts[key], dict):
            yield f"{key} must be a JSON object"
    config = facts["config"]
    for section, leaves in config.items():
        if not isinstance(leaves, dict):
            yield f"config.{section} must be a JSON object"
    moe = config.get("moe", {})
    for kind in EXPERT_KINDS:
        number = moe.get(kind, 0)
        if type(number) is not int or number < 0:
            yield f"config.moe.{kind}={number!r} must be an integer of at least 0"
    parameters = facts["parameters"]
    for key in ("total", "active"):
        if not isinstance(parameters.get(key), int):
            yield f"parameters.{key} must be an integer"
