"""Tokenizers from files: those that a run keeps, and those of released models."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax.data.errors import DataError, first_line
from moejax.data.storage.regular_files import read_regular
from moejax.data.tokenizers.beside import REMEDY, locate, read_beside, read_bounded
from moejax.data.tokenizers.ids import IdTokenizer
from moejax.data.tokenizers.interface import DESCRIPTION_FILE, MODEL_FILE, Tokenizer
from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.data.tokenizers.learned import SentencePieceTokenizer
from moejax.data.tokenizers.piece_file import PieceTokenizer
from moejax.data.tokenizers.released import ReleasedTokenizer, Special
from moejax.data.tokenizers.utf8 import ByteTokenizer

RELEASED: dict[str, Callable[[bytes, Special], ReleasedTokenizer]] = {
    JsonTokenizer.kind: JsonTokenizer,
    PieceTokenizer.kind: PieceTokenizer,
}


def open_tokenizer(given: str | Path, name: str = "") -> ReleasedTokenizer:
    """Returns the tokenizer of a released model.

    Args:
      given: its file: a `tokenizer.json`, or a sentencepiece model such as `tokenizer.model`.
        Which of them it is shows in its content. The files beside it are read, too.
      name: what it was given as, for errors.

    Raises:
      DataError, PathError: it is neither, or damaged, or does not say what ends a document.
    """
    path = locate(given, name)
    shown = f"{name}={path}" if name else str(path)
    content = read_bounded(path, shown)
    beside = read_beside(path.parent)
    try:
        if _is_json(content, shown):
            return JsonTokenizer.from_file(content, beside)
        return PieceTokenizer.from_file(content, beside)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{shown} is neither a tokenizer.json nor a sentencepiece model that can be read "
            f"({error}); {REMEDY}"
        ) from error


def _is_json(content: bytes, shown: str) -> bool:
    """Whether content is JSON, and not a sentencepiece model.

    Raises:
      DataError: it is the description of a run's tokenizer.
      ValueError: it is other JSON.
    """
    if content.lstrip()[:1] != b"{":
        return False
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return True  # the library says what is wrong
    if "model" in found:
        return True
    if "kind" in found:
        raise DataError(
            f"{shown} describes the tokenizer of a run; name a tokenizer.json of a released model"
        )
    raise ValueError("it is JSON without `model`")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote.

    Raises:
      DataError: a file is missing or corrupt.
    """
    path = Path(directory) / DESCRIPTION_FILE
    try:
        description = json.loads(_read(path))
        kind = description["kind"]
        vocab_size = description["vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _load_error(path, "is corrupt") from error
    if kind == ByteTokenizer.kind and vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if kind == IdTokenizer.kind and type(vocab_size) is int and vocab_size > 0:
        return IdTokenizer(vocab_size)
    if kind not in (SentencePieceTokenizer.kind, *RELEASED):
        raise _load_error(
            path, f"has kind={kind!r} and vocab_size={vocab_size}, which do not exist"
        )
    tokenizer = _load_model(path, description)
    if vocab_size != tokenizer.vocab_size:
        raise _load_error(path, f"has vocab_size={vocab_size} for {tokenizer.vocab_size} pieces")
    return tokenizer


def _load_model(description_path: Path, description: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of the file beside a description."""
    path = description_path.with_name(MODEL_FILE)
    model = _read(path)
    if hashlib.sha256(model).hexdigest() != description.get("sha256"):
        raise _load_error(path, f"is corrupt: it is not the file that {DESCRIPTION_FILE} describes")
    make = RELEASED.get(description["kind"])
    try:
        if make is None:
            return SentencePieceTokenizer(model)
        return make(model, _special(description_path, description))
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:
        raise _load_error(path, f"is no model this version reads: {first_line(error)}") from error


def _special(path: Path, description: Mapping[str, Any]) -> Special:
    try:
        return Special.from_dict(description["special"])
    except (KeyError, TypeError) as error:
        raise _load_error(path, "is corrupt: its special ids are none") from error


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _load_error(path, f"cannot be read: {error.strerror}") from error


def _load_error(path: Path, problem: str) -> DataError:
    """Returns the error for a tokenizer of a run, or of prepared data, that cannot be read."""
    folder = path.parent
    remedy = f"restore it from a copy, or remove the folder {folder} so that it is made again"
    if (folder / "config.json").exists():
        remedy = "restore it from a copy: the run's weights fit no other tokenizer"
    return DataError(f"{path} {problem}; {remedy}")
