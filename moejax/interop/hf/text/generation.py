"""How a released model wants to be sampled: `generation_config.json`."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.data.tokenizers.beside import REMEDY, read_json
from moejax.interop.hf.errors import HfError

FILE = "generation_config.json"

READ = {"do_sample", "temperature", "top_p", "top_k", "eos_token_id", "max_new_tokens"}

WITHOUT_EFFECT = {
    "_from_model_config",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "use_cache",
    "max_length",  # of prompt and text together, which here the caller chooses
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "length_penalty",  # of beams, as the next ones
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
}
"""Keys that change no text here."""

NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}
"""Values with which other keys change no text."""

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a model's folder says about sampling; None where it says nothing.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token.
      top_p: mass of the nucleus.
      top_k: the most tokens of a nucleus; 0 is no limit.
      max_tokens: the largest number of tokens to add.
      end_ids: ids that end a text; empty if the folder names none.
      ignored: keys with an effect that is not implemented, and their values.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    end_ids: tuple[int, ...] = ()
    ignored: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_generation(folder: Path) -> GenerationDefaults:
    """Returns the defaults of a folder; what is not implemented is logged.

    `do_sample=false` means temperature 0, whatever else is there.

    Raises:
      HfError, DataError: the file is damaged, or a value makes no sense.
    """
    path = folder / FILE
    found = read_json(path)
    samples = _flag(path, found, "do_sample")
    temperature = _number(path, found, "temperature", lambda value: 0 <= value <= 1e6)
    top_p = _number(path, found, "top_p", lambda value: 0 < value <= 1)
    if samples is False:
        temperature = 0.0
    ignored = {key: found[key] for key in found if _is_ignored(key, found[key])}
    if ignored:
        shown = ", ".join(f"{key}={value!r}" for key, value in ignored.items())
        log.warning("%s: not implemented, and left out: %s", path, shown)
    return GenerationDefaults(
        temperature=temperature,
        top_p=top_p,
        top_k=_whole(path, found, "top_k", 0),
        max_tokens=_whole(path, found, "max_new_tokens", 1),
        end_ids=_end_ids(path, found),
        ignored=ignored,
    )


def _is_ignored(key: str, value: Any) -> bool:
    if key in READ or key in WITHOUT_EFFECT or value is None:
        return False
    return key not in NEUTRAL or value != NEUTRAL[key]


def _flag(path: Path, found: Mapping[str, Any], key: str) -> bool | None:
    value = found.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise _wrong(path, key, value, "true or false")


def _number(path: Path, found: Mapping[str, Any], key: str, is_valid: Any) -> float | None:
    value = found.get(key)
    if value is None:
        return None
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or not is_valid(value):
        raise _wrong(path, key, value, "a number in its range")
    return float(value)


def _whole(path: Path, found: Mapping[str, Any], key: str, least: int) -> int | None:
    value = found.get(key)
    if value is None:
        return None
    if type(value) is not int or value < least:
        raise _wrong(path, key, value, f"a whole number of at least {least}")
    return value


def _end_ids(path: Path, found: Mapping[str, Any]) -> tuple[int, ...]:
    value = found.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise _wrong(path, "eos_token_id", value, "an id, or a list of ids")
    return tuple(ids)


def _wrong(path: Path, key: str, value: Any, expected: str) -> HfError:
    return HfError(f"{path}: {key}={value!r} must be {expected}; {REMEDY}")
