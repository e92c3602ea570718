"""The keys of LongRoPE as Phi-3.5-MoE has them, whose magnitudes are given."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.errors import HfError
from moejax.interop.hf.keys import Leaves, Mapped, first_of

KNOWN = {
    "long_factor",  # which the reference never uses
    "long_mscale",
    "original_max_position_embeddings",
    "rope_type",
    "short_factor",
    "short_mscale",
    "type",
}


def _read(published: Mapping[str, Any]) -> Leaves:
    scaling = first_of(published, ("rope_scaling",), {})
    kind = first_of(scaling, ("rope_type", "type"), "default")
    if kind == "default":
        return {"attention.rope_scaling": "none"}
    if kind != "longrope":
        raise HfError(f"rope_scaling has rope_type={kind}, which is not implemented; longrope is")
    unknown = sorted(scaling.keys() - KNOWN)
    if unknown:
        raise HfError(f"rope_scaling has {unknown[0]}, which is not implemented")
    of_model = ("original_max_position_embeddings", "max_position_embeddings")
    length = first_of(scaling, of_model[:1], first_of(published, of_model, 0))
    return {
        "attention.rope_scaling": "longrope",
        "attention.rope_wavelengths": ", ".join(map(str, first_of(scaling, ("short_factor",)))),
        "attention.rope_original_length": length,
        "attention.rope_magnitude": float(first_of(scaling, ("short_mscale",))),
        "attention.rope_long_magnitude": float(first_of(scaling, ("long_mscale",))),
    }


def _write(leaves: Leaves) -> dict[str, Any]:
    if leaves["attention.rope_scaling"] == "none":
        return {"rope_scaling": None}
    factors = [float(number) for number in leaves["attention.rope_wavelengths"].split(",")]
    length = leaves["attention.rope_original_length"]
    scaling = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "short_mscale": leaves["attention.rope_magnitude"],
        "long_mscale": leaves["attention.rope_long_magnitude"],
        "original_max_position_embeddings": length,
    }
    return {"rope_scaling": scaling, "original_max_position_embeddings": length}


LONG_ROPE = Mapped(("rope_scaling", "original_max_position_embeddings"), _read, _write)
