"""Tables of the keys of `config.json`, read in both directions.

Every key of a file must be one of the table of its family, or one that changes nothing of what the
model computes (`WITHOUT_MEANING`). What a table does not know is refused by name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from moejax.config import ConfigError, check_key
from moejax.interop.hf.errors import HfError

REQUIRED = object()
"""The default of a key that every file has."""

WITHOUT_MEANING = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",  # code, which is never run
    "attention_dropout",  # of training alone, as are initializer_range and output_router_logits
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "for_llm_compressor",
    "initializer_range",
    "max_position_embeddings",  # the length of texts in training, see `read_keys`
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "quantization_config",  # read where weights are, see files.quantized
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys that are not read: they say nothing of how a text is evaluated."""

Leaves = dict[str, Any]
"""Values of leaves by dotted key."""


@runtime_checkable
class Entry(Protocol):
    """An entry of a table: some keys of `config.json`, and the leaves that they set."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it reads."""

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns the leaves that the keys set; raises `HfError` for what is not implemented."""

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns the keys that such leaves are published as."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key whose value is that of a leaf.

    Attributes:
      key: of `config.json`.
      leaf: its dotted key.
      default: what the reference takes where the key is absent or null.
      aliases: other spellings of the key.
    """

    key: str
    leaf: str
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()

    def __post_init__(self):
        check_key(self.leaf)

    @property
    def keys(self) -> tuple[str, ...]:
        """The key in all spellings."""
        return (self.key, *self.aliases)

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns the leaf."""
        return {self.leaf: first_of(published, self.keys, self.default)}

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns the key."""
        return {self.key: leaves[self.leaf]}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A key that must have one value, since no other is implemented.

    Attributes:
      key: of `config.json`.
      value: the only one; also what the reference takes where the key is absent.
    """

    key: str
    value: Any

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.key,)

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns no leaf; refuses another value."""
        value = published.get(self.key, self.value)
        if value != self.value:
            raise HfError(
                f"{self.key}={value!r} is not implemented; only {self.key}={self.value!r} is"
            )
        return {}

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns the key."""
        del leaves
        return {self.key: self.value}


class Ignored:
    """Keys that say nothing of how a text is evaluated, or follow from others."""

    def __init__(self, *keys: str):
        self.keys = keys

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns no leaf."""
        del published
        return {}

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns no key."""
        del leaves
        return {}


@dataclasses.dataclass(frozen=True)
class Always:
    """A leaf that all models of a family have alike, and no key sets."""

    leaf: str
    value: Any
    keys: tuple[str, ...] = ()

    def __post_init__(self):
        check_key(self.leaf)

    def read(self, published: Mapping[str, Any]) -> Leaves:
        """Returns the leaf."""
        del published
        return {self.leaf: self.value}

    def write(self, leaves: Leaves) -> dict[str, Any]:
        """Returns nothing: the file does not say it."""
        del leaves
        return {}


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Keys that set leaves by functions of their own.

    Attributes:
      keys: of `config.json`.
      read: from the file's keys to leaves.
      write: from leaves to keys.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Leaves]
    write: Callable[[Leaves], dict[str, Any]]


def without(table: Sequence[Entry], *keys: str) -> tuple[Entry, ...]:
    """Returns a table without the entries of some keys."""
    return tuple(entry for entry in table if not set(keys) & set(entry.keys))


def first_of(published: Mapping[str, Any], keys: Sequence[str], default: Any = REQUIRED) -> Any:
    """Returns the value of the first key that is there and not null.

    Raises:
      HfError: there is none, and no default.
    """
    for key in keys:
        if published.get(key) is not None:
            return published[key]
    if default is REQUIRED:
        raise HfError(f"config.json has no {keys[0]}; it needs one")
    return default


def with_older_spelling(published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keys with the rotary embedding as older files spell it.

    Newer ones have `rope_parameters` in place of `rope_theta`, `partial_rotary_factor` and
    `rope_scaling`.
    """
    keys = dict(published)
    rope = keys.pop("rope_parameters", None)
    if rope is None:
        return keys
    rope = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            keys[name] = rope.pop(name)
    is_plain = rope in ({}, {"rope_type": "default"}, {"rope_type": None})
    keys["rope_scaling"] = None if is_plain else rope
    return keys


def read_keys(table: Sequence[Entry], published: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns sections of leaves.

    Args:
      table: of the family.
      published: the content of `config.json`.

    Raises:
      HfError: a key that the family does not have, or a value that is not implemented.
    """
    keys = with_older_spelling(published)
    known = set(WITHOUT_MEANING)
    for entry in table:
        known.update(entry.keys)
    for name, value in keys.items():
        if name not in known and value is not None:
            raise HfError(
                f"config.json has {name}={value!r}, which is not implemented for "
                f"model_type={published.get('model_type')}"
            )
    sections: dict[str, dict[str, Any]] = {}
    length = keys.get("max_position_embeddings")
    if length is not None:
        sections["data"] = {"seq_len": length}
    for entry in table:
        for leaf, value in entry.read(keys).items():
            section, name = leaf.split(".")
            sections.setdefault(section, {})[name] = value
    return sections


def write_keys(table: Sequence[Entry], leaves: Leaves) -> dict[str, Any]:
    """Returns the keys of `config.json` for a model.

    Raises:
      HfError: a leaf with a value that the family does not have.
      ConfigError: a leaf that is no leaf.
    """
    written: dict[str, Any] = {}
    for entry in table:
        try:
            written.update(entry.write(leaves))
        except KeyError as error:
            raise ConfigError(f"{error.args[0]} is no leaf") from error
    return written
