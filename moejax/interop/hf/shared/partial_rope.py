"""The keys of rotary positions on a part of each head."""

import functools
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, Mapped, first_of
from moejax.interop.hf.llama import head_width


def partial_rope(key: str, *, fraction: float = 1.0, head_dim: int = 0) -> Mapped:
    """Returns the keys of rotated dimensions.

    Args:
      key: which of both is written, `partial_rotary_factor` or `rotary_dim`; both are read, and the
        first one counts.
      fraction: of a head, where files have neither.
      head_dim: width of a head where files lack it, see `llama.head_width`.
    """
    write = _write_number if key == "rotary_dim" else _write_fraction
    read = functools.partial(_read, fraction, head_dim)
    return Mapped(("partial_rotary_factor", "rotary_dim"), read, write)


def _read(default: float, head_dim: int, published: Mapping[str, Any]) -> Leaves:
    head = head_width(published, head_dim)
    number = first_of(published, ("rotary_dim",), 0)
    fraction = first_of(published, ("partial_rotary_factor",), number / head if number else default)
    num_rotated = int(head * fraction)
    if not 2 <= num_rotated <= head:
        raise HfError(
            f"partial_rotary_factor={fraction} rotates {num_rotated} of the {head} dimensions of "
            f"a head; it must be 2 to {head} of them"
        )
    return {"attention.rope_dim": 0 if num_rotated == head else num_rotated}


def _write_fraction(leaves: Leaves) -> dict[str, Any]:
    """Returns the fraction; it is read by rounding down, so that an inexact one is a bit larger."""
    head = _head(leaves)
    num_rotated = leaves["attention.rope_dim"] or head
    fraction = num_rotated / head
    if int(head * fraction) != num_rotated:
        fraction = (num_rotated + 0.5) / head
    return {"partial_rotary_factor": fraction}


def _write_number(leaves: Leaves) -> dict[str, Any]:
    return {"rotary_dim": leaves["attention.rope_dim"] or _head(leaves)}


def _head(leaves: Leaves) -> int:
    return leaves["attention.head_dim"] or leaves["model.d_model"] // leaves["attention.num_heads"]
