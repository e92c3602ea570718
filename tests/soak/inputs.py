"""Mistakes on the command line are one line and exit code 2, at once."""

import string
from collections.abc import Callable

import numpy as np

from moejax.cli import VERBS
from moejax.config import leaves
from soak.field import REPOSITORY, Field, call, refusal

RECIPES = sorted((REPOSITORY / "configs").rglob("*.py"))
CONFIGS = [path.relative_to(REPOSITORY).as_posix() for path in RECIPES]
OF_A_RUN = ("eval", "generate", "report", "counterfactuals", "placement")
KEYS = [key for key, _ in leaves()]
NUMBERS = [key for key, annotation in leaves() if annotation in (int, float)]


def trial(field: Field, seed: int) -> str:
    """Draws a mistake; returns what was wrong with the answer."""
    rng = np.random.default_rng(seed)
    mistakes = (
        _stray_word,
        _unknown_verb,
        _unknown_flag,
        _unknown_key,
        _wrong_value,
        _no_recipe,
        _no_run,
        _flag_twice,
    )
    make_mistake = _one_of(rng, mistakes)
    arguments = make_mistake(field, rng)
    code, out, errors = call(arguments)
    problem = refusal(code, errors)
    if not problem and code != 2:
        problem = f"exit code {code}"
    if not problem and out:
        problem = f"output {out[:100]!r}"
    return f"{' '.join(arguments)}: {problem}" if problem else ""


Draw = Callable[[Field, np.random.Generator], list[str]]


def _one_of(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


def _word(rng: np.random.Generator) -> str:
    """Draws letters that are no word of moejax."""
    letters = rng.choice([*string.ascii_lowercase], rng.integers(3, 12))
    return f"zq{''.join(letters)}"


def _mistyped(rng: np.random.Generator, text: str) -> str:
    """Returns a text with one letter doubled, which makes no other name."""
    place = rng.integers(len(text))
    return f"{text[:place]}{text[place]}{text[place]}{text[place:]}"


def _train(field: Field, rng: np.random.Generator) -> list[str]:
    return ["train", f"--config={_one_of(rng, CONFIGS)}", f"--workdir={field.folder / 'never'}"]


def _of_a_run(field: Field, rng: np.random.Generator) -> list[str]:
    return [_one_of(rng, OF_A_RUN), f"--workdir={field.undisturbed}"]


def _stray_word(field: Field, rng: np.random.Generator) -> list[str]:
    word = _one_of(rng, (_word(rng), f"{_one_of(rng, KEYS)}=3"))
    return [*_one_of(rng, (_train, _of_a_run))(field, rng), word]


def _unknown_verb(field: Field, rng: np.random.Generator) -> list[str]:
    return [_one_of(rng, (_word(rng), _mistyped(rng, _one_of(rng, list(VERBS)))))]


def _unknown_flag(field: Field, rng: np.random.Generator) -> list[str]:
    flag = _one_of(rng, (_word(rng), "workdirr", "lr", _one_of(rng, KEYS)))
    return [*_one_of(rng, (_train, _of_a_run))(field, rng), f"--{flag}=1"]


def _unknown_key(field: Field, rng: np.random.Generator) -> list[str]:
    return [*_train(field, rng), f"--config.{_mistyped(rng, _one_of(rng, KEYS))}=1"]


def _wrong_value(field: Field, rng: np.random.Generator) -> list[str]:
    """Gives a number a value that no number can have."""
    value = _one_of(rng, ("eight", "-7", "nan", "1e400", "9" * 400, "", "[1]", "-inf"))
    return [*_train(field, rng), f"--config.{_one_of(rng, NUMBERS)}={value}"]


def _no_recipe(field: Field, rng: np.random.Generator) -> list[str]:
    missing = f"configs/{_word(rng)}.py"
    with_argument = f"{CONFIGS[0]}:{_word(rng)}"
    recipe = _one_of(rng, (missing, "configs", "configs/debug", with_argument))
    return ["train", f"--config={recipe}", f"--workdir={field.folder / 'never'}"]


def _no_run(field: Field, rng: np.random.Generator) -> list[str]:
    missing = field.folder / _word(rng)
    workdir = _one_of(rng, (missing, field.folder / "data", REPOSITORY / "setup.py", ""))
    return [_one_of(rng, OF_A_RUN), f"--workdir={workdir}"]


def _flag_twice(field: Field, rng: np.random.Generator) -> list[str]:
    arguments = _one_of(rng, (_train, _of_a_run))(field, rng)
    return [*arguments, f"--workdir={field.folder / _word(rng)}"]
