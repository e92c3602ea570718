"""The keys of rotary positions that are made for longer texts."""

import math
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, Mapped, first_of

KNOWN = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rope_type",
    "truncate",
    "type",
}


def _read(published: Mapping[str, Any]) -> Leaves:
    scaling = published.get("rope_scaling")
    if scaling is None:
        return {"attention.rope_scaling": "none"}
    unknown = sorted(scaling.keys() - KNOWN)
    if unknown:
        raise HfError(f"rope_scaling has {unknown[0]}, which is not implemented")
    kind = first_of(scaling, ("rope_type", "type"), "default")
    if kind == "default":
        return {"attention.rope_scaling": "none"}
    if kind != "yarn":
        raise HfError(f"rope_scaling has rope_type={kind}, which is not implemented; yarn is")
    length = first_of(published, ("max_position_embeddings",), 0)
    return {
        "attention.rope_scaling": "yarn",
        "attention.rope_factor": float(first_of(scaling, ("factor",))),
        "attention.rope_original_length": first_of(
            scaling, ("original_max_position_embeddings",), length
        ),
        "attention.rope_beta_fast": float(first_of(scaling, ("beta_fast",), 32.0)),
        "attention.rope_beta_slow": float(first_of(scaling, ("beta_slow",), 1.0)),
        "attention.rope_truncate": first_of(scaling, ("truncate",), True),
        "attention.rope_magnitude": _magnitude(scaling),
    }


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
    if leaves["attention.rope_scaling"] == "none":
        return {"rope_scaling": None}
    scaling = {
        "rope_type": "yarn",
        "factor": leaves["attention.rope_factor"],
        "original_max_position_embeddings": leaves["attention.rope_original_length"],
        "beta_fast": leaves["attention.rope_beta_fast"],
        "beta_slow": leaves["attention.rope_beta_slow"],
        "truncate": leaves["attention.rope_truncate"],
    }
    if leaves["attention.rope_magnitude"]:
        scaling["attention_factor"] = leaves["attention.rope_magnitude"]
    return {"rope_scaling": scaling}


ROPE_SCALING = Mapped(("rope_scaling",), _read, write_scaling)
"""Read from either spelling, see `keys.with_older_spelling`."""
