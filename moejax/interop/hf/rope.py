"""The keys of rotary positions: how many dimensions turn, and how fast in longer texts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, Mapped, first_of

KINDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
}
"""What `rope_scaling` holds in addition to its kind, by kind."""


def kind_of(scaling: Mapping[str, Any]) -> str:
    """Returns the kind of a `rope_scaling`, which is spelled in two ways."""
    return first_of(scaling, ("rope_type", "type"), "default")


def read_scaling(published: Mapping[str, Any]) -> Leaves:
    """Returns the leaves of how frequencies are scaled; raises `HfError` for other kinds."""
    scaling = published.get("rope_scaling") or {}
    kind = kind_of(scaling)
    if kind not in KINDS:
        raise HfError(
            f"rope_scaling has rope_type={kind}, which is not implemented; {', '.join(KINDS)} are"
        )
    unknown = sorted(scaling.keys() - KINDS[kind] - {"rope_type", "type"})
    if unknown:
        raise HfError(f"rope_scaling has {unknown[0]}, which is not implemented for {kind}")
    if kind == "default":
        return {"attention.rope_scaling": "none"}
    leaves = {
        "attention.rope_scaling": kind,
        "attention.rope_factor": float(first_of(scaling, ("factor",))),
    }
    if kind != "linear":
        length = first_of(published, ("max_position_embeddings",), 0)
        leaves["attention.rope_original_length"] = first_of(
            scaling, ("original_max_position_embeddings",), length
        )
    return leaves | READ_RAMP[kind](scaling)


def _read_no_ramp(scaling: Mapping[str, Any]) -> Leaves:
    del scaling
    return {}


def _read_llama3(scaling: Mapping[str, Any]) -> Leaves:
    return {
        "attention.rope_beta_fast": float(first_of(scaling, ("high_freq_factor",))),
        "attention.rope_beta_slow": float(first_of(scaling, ("low_freq_factor",))),
    }


def _read_yarn(scaling: Mapping[str, Any]) -> Leaves:
    return {
        "attention.rope_beta_fast": float(first_of(scaling, ("beta_fast",), 32.0)),
        "attention.rope_beta_slow": float(first_of(scaling, ("beta_slow",), 1.0)),
        "attention.rope_truncate": first_of(scaling, ("truncate",), True),
        "attention.rope_magnitude": _magnitude(scaling),
    }


READ_RAMP: dict[str, Callable[[Mapping[str, Any]], Leaves]] = {
    "linear": _read_no_ramp,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
"""How the leaves that only some kinds have are read."""


def _magnitude(scaling: Mapping[str, Any]) -> float:
    """Returns the factor on queries and keys; 0 where it follows from the factor."""
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and all_dim):
        return 0.0
    log_factor = math.log(scaling["factor"])
    return (0.1 * mscale * log_factor + 1) / (0.1 * all_dim * log_factor + 1)


def write_scaling(leaves: Leaves) -> dict[str, Any]:
    """Returns the key that the leaves are published as."""
    kind = leaves["attention.rope_scaling"]
    if kind == "none":
        return {"rope_scaling": None}
    if kind not in WRITE_RAMP:
        raise HfError(f"attention.rope_scaling={kind} has no key in this family")
    scaling = {"rope_type": kind, "factor": leaves["attention.rope_factor"]}
    return {"rope_scaling": scaling | WRITE_RAMP[kind](leaves)}


def _write_no_ramp(leaves: Leaves) -> dict[str, Any]:
    del leaves
    return {}


def _write_llama3(leaves: Leaves) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": leaves["attention.rope_original_length"],
        "high_freq_factor": leaves["attention.rope_beta_fast"],
        "low_freq_factor": leaves["attention.rope_beta_slow"],
    }


def _write_yarn(leaves: Leaves) -> dict[str, Any]:
    scaling = {
        "original_max_position_embeddings": leaves["attention.rope_original_length"],
        "beta_fast": leaves["attention.rope_beta_fast"],
        "beta_slow": leaves["attention.rope_beta_slow"],
        "truncate": leaves["attention.rope_truncate"],
    }
    if leaves["attention.rope_magnitude"]:
        scaling["attention_factor"] = leaves["attention.rope_magnitude"]
    return scaling


WRITE_RAMP: dict[str, Callable[[Leaves], dict[str, Any]]] = {
    "linear": _write_no_ramp,
    "llama3": _write_llama3,
    "yarn": _write_yarn,
}
"""How they are written."""

ROPE_SCALING = Mapped(("rope_scaling",), read_scaling, write_scaling)
"""Read from either spelling, see `keys.with_older_spelling`."""
