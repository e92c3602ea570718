"""What must hold so that a leaf is read: small conditions on other leaves, which combine."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Reading(Protocol):
    """A configuration as one of its layers reads it."""

    def get(self, key: str) -> Any:
        """Returns the value of a leaf."""

    def is_derived(self, key: str) -> bool:
        """Whether the leaf has the value that `resolve` derives where none is given."""

    def has_dense_layer(self) -> bool:
        """Whether a layer of the model is dense."""

    def is_read(self, key: str) -> bool:
        """Whether another leaf is read."""


@runtime_checkable
class Need(Protocol):
    """What must hold so that a leaf is read."""

    @property
    def text(self) -> str:
        """Words that follow "it needs"."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The leaves that decide."""

    def holds(self, reading: Reading) -> bool:
        """Whether the need is met."""


@dataclasses.dataclass(frozen=True)
class Value:
    """Another leaf has one of these values, or if `is_excluded` none of them."""

    key: str
    values: tuple[Any, ...]
    is_excluded: bool = False

    @property
    def text(self) -> str:
        """Such as `data.source=files`."""
        if self.is_excluded and self.values == (0,):
            return f"{self.key} above 0"
        if self.is_excluded and self.values == ("",):
            return f"{self.key}, which is empty"
        relation = " other than " if self.is_excluded else "="
        return f"{self.key}{relation}{_listed(self.values)}"

    @property
    def keys(self) -> tuple[str, ...]:
        """That leaf."""
        return (self.key,)

    def holds(self, reading: Reading) -> bool:
        """Whether the leaf does."""
        is_listed = reading.get(self.key) in self.values
        return is_listed is not self.is_excluded


@dataclasses.dataclass(frozen=True)
class Derived:
    """Another leaf is derived, from this one among others."""

    key: str

    @property
    def text(self) -> str:
        """Such as `moe.d_expert=0, which is derived from it`."""
        return f"{self.key}=0, which is derived from it"

    @property
    def keys(self) -> tuple[str, ...]:
        """That leaf."""
        return (self.key,)

    def holds(self, reading: Reading) -> bool:
        """Whether it is."""
        return reading.is_derived(self.key)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Another leaf, on which this one is a factor, is above 0 and read."""

    key: str

    @property
    def text(self) -> str:
        """Such as `moe.jitter, which it scales, to be above 0 and read by a layer`."""
        return f"{self.key}, which it scales, to be above 0 and read by a layer"

    @property
    def keys(self) -> tuple[str, ...]:
        """That leaf."""
        return (self.key,)

    def holds(self, reading: Reading) -> bool:
        """Whether it is."""
        return reading.get(self.key) > 0 and reading.is_read(self.key)


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """The model has a dense layer."""

    text = "a dense layer"
    keys = ("moe.num_experts", "moe.first_dense", "moe.every", "moe.per_layer")

    def holds(self, reading: Reading) -> bool:
        """Whether it has one."""
        return reading.has_dense_layer()


@dataclasses.dataclass(frozen=True)
class AllOf:
    """All of several needs, in the same layer."""

    needs: tuple[Need, ...]

    @property
    def text(self) -> str:
        """The needs, joined by "and"."""
        return " and ".join(map(_in_conjunction, self.needs))

    @property
    def keys(self) -> tuple[str, ...]:
        """The leaves that decide about any of the needs."""
        return _keys(self.needs)

    def holds(self, reading: Reading) -> bool:
        """Whether all are met."""
        return all(need.holds(reading) for need in self.needs)


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """One of several needs."""

    needs: tuple[Need, ...]

    @property
    def text(self) -> str:
        """The needs, joined by "or"."""
        return ", or ".join(need.text for need in self.needs)

    @property
    def keys(self) -> tuple[str, ...]:
        """The leaves that decide about any of the needs."""
        return _keys(self.needs)

    def holds(self, reading: Reading) -> bool:
        """Whether one is met."""
        return any(need.holds(reading) for need in self.needs)


def _in_conjunction(need: Need) -> str:
    """Returns the words of a need that stands next to "and"."""
    return f"({need.text})" if isinstance(need, AnyOf) else need.text


def _keys(needs: Iterable[Need]) -> tuple[str, ...]:
    """Returns the leaves that decide about any of the needs, each once."""
    found: dict[str, None] = {}
    for need in needs:
        found.update(dict.fromkeys(need.keys))
    return tuple(found)


def value(key: str, *values: Any) -> Need:
    """Returns the need for a leaf to have one of these values."""
    return Value(key, values)


def other_than(key: str, *values: Any) -> Need:
    """Returns the need for a leaf to have none of these values."""
    return Value(key, values, is_excluded=True)


def all_of(*needs: Need) -> Need:
    """Returns the need for all of these at once."""
    return AllOf(needs)


def any_of(*needs: Need) -> Need:
    """Returns the need for one of these."""
    return AnyOf(needs)


def _listed(values: tuple[Any, ...]) -> str:
    """Returns values as words: "a", "a or b", "a, b or c"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
