"""What the tokenizers of released models share: special ids of their own, and a file as it came.

A run keeps a copy of the file and what was read beside it, so that it needs neither again.
"""

import abc
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.data.errors import DataError
from moejax.data.tokenizers.beside import SETTINGS_FILE, AddedToken, Beside
from moejax.data.tokenizers.interface import save_files

LARGEST_ID = 2**24
"""No embedding has so many rows."""


@dataclasses.dataclass(frozen=True)
class Special:
    """The special ids of a tokenizer, and how it treats text with special tokens.

    Attributes:
      bos_id: begins a document; `eos_id` where the tokenizer has no such token.
      eos_id: ends a document.
      pad_id: `eos_id` where the tokenizer has no such token.
      adds_bos: whether a prompt begins with `bos_id`.
      is_legacy: see `Beside`.
      added: tokens beside the vocabulary.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    adds_bos: bool
    is_legacy: bool = True
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Special":
        """Returns what `dataclasses.asdict` wrote.

        Raises:
          KeyError, TypeError: it wrote something else.
        """
        added = tuple(AddedToken(**token) for token in values["added"])
        ids = [values[name] for name in ("bos_id", "eos_id", "pad_id")]
        ids += [token.id for token in added]
        if not all(type(id) is int and 0 <= id < LARGEST_ID for id in ids):
            raise TypeError("an id is no id")
        return cls(**{**values, "added": added})


class ReleasedTokenizer(abc.ABC):
    """A tokenizer of a released model.

    Attributes:
      special: its special ids.
    """

    kind: str
    vocab_size: int

    def __init__(self, content: bytes, special: Special):
        """Keeps the content of the tokenizer's file, and its special ids."""
        self._content = content
        self.special = special
        self.bos_id = special.bos_id
        self.eos_id = special.eos_id
        self.pad_id = special.pad_id
        self.end_ids: tuple[int, ...] = (special.eos_id,)
        self.adds_bos = special.adds_bos
        self._sha256 = hashlib.sha256(content).hexdigest()
        determines = json.dumps([self._sha256, dataclasses.asdict(special)])
        digest = hashlib.sha256(determines.encode()).hexdigest()
        self.fingerprint = f"{self.kind}-{digest}"

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""

    @abc.abstractmethod
    def encode_markup(self, text: str) -> list[int]:
        """Returns the ids of text in which special tokens are written out, as in a chat."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; numbers that are no ids are skipped, too."""

    @abc.abstractmethod
    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""

    def check_ids(self) -> None:
        """Raises `ValueError` for special ids that are no ids of the vocabulary."""
        if self.vocab_size > LARGEST_ID:
            raise ValueError(f"its largest id is {self.vocab_size - 1}")
        for name in ("bos_id", "eos_id", "pad_id"):
            id = getattr(self, name)
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"{name}={id} is none of its {self.vocab_size} ids")

    def with_ends(self, ids: Iterable[int]) -> "ReleasedTokenizer":
        """Returns the same tokenizer with more ids that end what is generated."""
        other = copy.copy(self)
        other.end_ids = tuple(dict.fromkeys([*self.end_ids, *ids]))
        return other

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        description = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": self._sha256,
            "special": dataclasses.asdict(self.special),
        }
        save_files(directory, description, self._content)


def find_special(
    beside: Beside,
    id_of: Callable[[str], int | None],
    own_ids: Mapping[str, int],
    adds_bos: bool,
) -> Special:
    """Returns the special ids of a tokenizer.

    Args:
      beside: what the files beside it say, which counts first.
      id_of: returns the id of a token's text, None if there is no such token.
      own_ids: what its own file says, by `bos_token` and others.
      adds_bos: whether its own file, or its kind, puts `bos_token` before a text.

    Raises:
      DataError: a token that is named does not exist, or none ends a document.
    """
    ids = {key: _special_id(key, beside, id_of, own_ids) for key in ("bos_token", "eos_token")}
    bos_id, eos_id = ids["bos_token"], ids["eos_token"]
    if eos_id is None:
        raise DataError(
            f"{beside.folder}: no file says which token ends a document; {SETTINGS_FILE} with "
            "eos_token must be beside the tokenizer"
        )
    pad_id = _special_id("pad_token", beside, id_of, own_ids)
    adds_bos = adds_bos if beside.adds_bos is None else beside.adds_bos
    if bos_id is None and beside.adds_bos:
        raise DataError(
            f"{beside.folder / SETTINGS_FILE}: add_bos_token=true needs bos_token; name it"
        )
    return Special(
        bos_id=eos_id if bos_id is None else bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        adds_bos=adds_bos and bos_id is not None,
        is_legacy=beside.is_legacy,
        added=beside.added,
    )


def _special_id(
    key: str,
    beside: Beside,
    id_of: Callable[[str], int | None],
    own_ids: Mapping[str, int],
) -> int | None:
    """Returns the id of a special token: by its name, else by an id beside, else the file's own."""
    if key not in beside.names:
        return own_ids.get(key, beside.ids.get(f"{key}_id"))
    name = beside.names[key]
    if name is None:
        return None
    id = id_of(name)
    if id is None:
        raise DataError(
            f"{beside.folder / SETTINGS_FILE}: {key}={name!r} is no token of the tokenizer beside "
            "it; take both from the same model"
        )
    return id
