"""Biases of attention that one key turns on for all four projections."""

import functools
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.keys import Leaves, Mapped, first_of
from moejax.interop.hf.llama import QKV_BIAS
from moejax.interop.hf.tensors import Tensor


def _read(default: bool, published: Mapping[str, Any]) -> Leaves:
    has_bias = first_of(published, ("attention_bias",), default)
    return {"attention.qkv_bias": has_bias, "attention.out_bias": has_bias}


def _write(leaves: Leaves) -> dict[str, Any]:
    return {"attention_bias": leaves["attention.qkv_bias"]}


def attention_bias(*, default: bool) -> Mapped:
    """Returns the key; `default` is what the reference takes where it is absent."""
    return Mapped(("attention_bias",), functools.partial(_read, default), _write)


ATTENTION_BIAS = attention_bias(default=False)

BIASES = (
    *QKV_BIAS,
    Tensor("self_attn.o_proj.bias", "D", "mixer/out_bias", "D", only_with="mixer/out_bias"),
)
"""Their tensors, which a model without biases lacks."""
