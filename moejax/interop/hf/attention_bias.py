"""Biases of attention that one key turns on for all four projections."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.keys import Leaves, Mapped, first_of
from moejax.interop.hf.llama import QKV_BIAS
from moejax.interop.hf.tensors import Tensor


def _read(published: Mapping[str, Any]) -> Leaves:
    has_bias = first_of(published, ("attention_bias",), False)
    return {"attention.qkv_bias": has_bias, "attention.out_bias": has_bias}


def _write(leaves: Leaves) -> dict[str, Any]:
    return {"attention_bias": leaves["attention.qkv_bias"]}


ATTENTION_BIAS = Mapped(("attention_bias",), _read, _write)

BIASES = (
    *QKV_BIAS,
    Tensor("self_attn.o_proj.bias", "D", "mixer/out_bias", "D", only_with="mixer/out_bias"),
)
"""Their tensors, which a model without biases lacks."""
