"""Llama 4 Scout and Maverick (Meta 2025): their model of text, alone or beside one of images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import (
    Always,
    Entry,
    Fixed,
    Ignored,
    Key,
    Leaves,
    Mapped,
    first_of,
    read_keys,
)
from moejax.interop.hf.llama import ATTENTION, NORMS, OUTER, decoder, feed_forward
from moejax.interop.hf.shared.sparse_layers import layers_with_experts
from moejax.interop.hf.shared.windows import kinds_of_layers, read_layer_types, shortest_pattern
from moejax.interop.hf.tensors import Tensor

KINDS = {"chunked_attention": "chunk", "full_attention": "full"}
"""What `layer_types` lists, and what we call it."""


def _have_rope(published: Mapping[str, Any]) -> list[bool]:
    """Returns which layers have rotary positions: all but every fourth, if nothing is said."""
    num_layers = first_of(published, ("num_hidden_layers",))
    listed = first_of(published, ("no_rope_layers",), [])
    if listed:
        if len(listed) < num_layers:
            raise HfError(f"no_rope_layers={listed} must have a number for each layer")
        return [bool(has_rope) for has_rope in listed[:num_layers]]
    interval = first_of(published, ("no_rope_layer_interval",), 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _read_positions(published: Mapping[str, Any]) -> Leaves:
    """Returns the leaves of layers with and without rotary positions, and of their norm."""
    have_rope = _have_rope(published)
    has_norm = first_of(published, ("use_qk_norm",), True)
    leaves: Leaves = {
        "attention.rope_layers": shortest_pattern(["rope" if has else "none" for has in have_rope]),
        "attention.qk_norm": "unweighted" if has_norm else "none",
        "attention.qk_norm_after_rope": has_norm,
    }
    if all(have_rope):
        return leaves
    if has_norm:
        leaves["attention.qk_norm_layers"] = "rope"
    growth = float(first_of(published, ("attn_scale",), 0.1))
    # The key counts as true or false; files have 4.
    if growth and first_of(published, ("attn_temperature_tuning",), True):
        leaves["attention.temperature"] = growth
        leaves["attention.temperature_length"] = first_of(published, ("floor_scale",), 8192)
    return leaves


def _write_positions(leaves: Leaves) -> dict[str, Any]:
    kinds = kinds_of_layers(leaves["attention.rope_layers"], leaves["model.num_layers"])
    return {
        "no_rope_layers": [int(kind == "rope") for kind in kinds],
        "use_qk_norm": leaves["attention.qk_norm"] != "none",
        "attn_temperature_tuning": leaves["attention.temperature"] > 0,
        "attn_scale": leaves["attention.temperature"],
        "floor_scale": leaves["attention.temperature_length"],
    }


POSITIONS = Mapped(
    (
        "no_rope_layers",
        "no_rope_layer_interval",
        "use_qk_norm",
        "attn_temperature_tuning",
        "attn_scale",
        "floor_scale",
    ),
    _read_positions,
    _write_positions,
)


def _read_chunks(published: Mapping[str, Any]) -> Leaves:
    """Returns the chunks, which layers with rotary positions have if nothing is said."""
    kinds = read_layer_types(published, KINDS)
    if kinds is None:
        kinds = ["chunk" if has_rope else "full" for has_rope in _have_rope(published)]
    if "chunk" not in kinds:
        return {"attention.chunk": 0}
    return {
        "attention.chunk": published.get("attention_chunk_size", 8192) or 0,
        "attention.chunk_layers": shortest_pattern(kinds),
    }


def _write_chunks(leaves: Leaves) -> dict[str, Any]:
    num_layers = leaves["model.num_layers"]
    chunk = leaves["attention.chunk"]
    if not chunk:
        # The reference makes a mask of chunks even where no layer has it, and needs their size.
        return {"attention_chunk_size": 8192, "layer_types": ["full_attention"] * num_layers}
    theirs = {ours: theirs for theirs, ours in KINDS.items()}
    kinds = kinds_of_layers(leaves["attention.chunk_layers"], num_layers)
    return {"attention_chunk_size": chunk, "layer_types": [theirs[kind] for kind in kinds]}


def _read_layers(published: Mapping[str, Any]) -> Leaves:
    """Returns which layers have experts: those listed, or every so many."""
    num_layers = first_of(published, ("num_hidden_layers",))
    step = first_of(published, ("interleave_moe_layer_step",), 1)
    listed = published.get("moe_layers")
    if listed is None:
        listed = range(step - 1, num_layers, step)
    return layers_with_experts([layer in listed for layer in range(num_layers)])


def _write_layers(leaves: Leaves) -> dict[str, Any]:
    layers = range(leaves["model.num_layers"])
    return {"moe_layers": [layer for layer in layers if layer not in leaves["dense_layers"]]}


KEYS: tuple[Entry, ...] = (
    *decoder(head_dim=128),
    ATTENTION_BIAS,
    POSITIONS,
    Mapped(("attention_chunk_size", "layer_types"), _read_chunks, _write_chunks),
    Key("rope_theta", "attention.rope_theta", default=5e5),
    Always("attention.rope_interleaved", True),
    Mapped(("moe_layers", "interleave_moe_layer_step"), _read_layers, _write_layers),
    Key("num_local_experts", "moe.num_experts"),
    Key("num_experts_per_tok", "moe.top_k"),
    Key("intermediate_size", "moe.d_expert"),
    Key("intermediate_size_mlp", "model.d_ff"),
    Fixed("router_jitter_noise", 0.0),
    # The reference has no auxiliary loss.
    Ignored("router_aux_loss_coef"),
    Ignored("for_llm_compressor", "cache_implementation", "_attn_implementation_autoset"),
    Always("moe.router", "sigmoid_topk"),
    Always("moe.score", "sigmoid"),
    Always("moe.renormalize", False),
    Always("moe.weight_on", "input"),
    Always("moe.num_shared_experts", 1),
    Always("moe.balance_weight", 0.0),
    Always("moe.z_weight", 0.0),
)
"""Keys of a model of text."""

LAYER = (*NORMS, *ATTENTION, *BIASES)
DENSE = feed_forward("feed_forward", "ffn")
MOE = (
    Tensor("feed_forward.router.weight", "E D", "ffn/router/kernel", "D E"),
    Tensor("feed_forward.experts.gate_up_proj", "E D (P F)", "ffn/experts/gate_up", "E D P F"),
    Tensor("feed_forward.experts.down_proj", "E F D", "ffn/experts/down", "E F D"),
    *feed_forward("feed_forward.shared_expert", "ffn/shared"),
)

DEVIATIONS = {
    "lpad.gen.logits": "to the reference, padding before a prompt counts as text where queries "
    "grow with their position; here prompts have none"
}

TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    keys=KEYS,
    outer=OUTER,
    layer=LAYER,
    dense=DENSE,
    moe=MOE,
    deviations=DEVIATIONS,
)
"""A model of text alone."""


def _read_text(published: Mapping[str, Any]) -> Leaves:
    """Returns the leaves of the model of text."""
    text = first_of(published, ("text_config",))
    leaves = {}
    for section, values in read_keys(KEYS, {"model_type": "llama4_text", **text}).items():
        for name, value in values.items():
            leaves[f"{section}.{name}"] = value
    return leaves


def _refuse_to_write(leaves: Leaves) -> dict[str, Any]:
    """Raises `HfError`: the other half of such a model is not ours."""
    del leaves
    raise HfError("model_type=llama4 has a model of images, too; write the text's as llama4_text")


def _is_of_images(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor is of the model of images, or of what makes its output tokens."""
    del published
    return name.startswith(("vision_model.", "multi_modal_projector."))


OUTER_BESIDE_IMAGES = tuple(
    dataclasses.replace(tensor, theirs=f"language_model.{tensor.theirs}") for tensor in OUTER
)

FAMILY = Family(
    model_type="llama4",
    architecture="Llama4ForConditionalGeneration",
    keys=(
        Mapped(("text_config",), _read_text, _refuse_to_write),
        Fixed("tie_word_embeddings", False),
        Ignored("vision_config", "image_token_index", "boi_token_index", "eoi_token_index"),
    ),
    outer=OUTER_BESIDE_IMAGES,
    layer=LAYER,
    dense=DENSE,
    moe=MOE,
    prefix="language_model.model.layers.{layer}.",
    is_ignored=_is_of_images,
    deviations=DEVIATIONS,
)
"""The published files, whose model of images is left out: texts alone are evaluated."""
