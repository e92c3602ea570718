"""Values and combinations that cannot work, whatever the number of devices."""

import dataclasses
from collections.abc import Iterable

from moejax.config.errors import ConfigError, require
from moejax.config.moe_rules import validate_moe
from moejax.config.schema.leaf import check_range
from moejax.config.schema.tree import declared
from moejax.config.sections.alarms import validate_alarms
from moejax.config.sections.attention import validate_attention
from moejax.config.sections.data import validate_data
from moejax.config.sections.init import validate_init, validate_upcycling
from moejax.config.sections.moe import MoeConfig
from moejax.config.sections.mup import validate_mup
from moejax.config.sections.optimizer import validate_optimizer
from moejax.config.sections.root import Config
from moejax.config.sections.schedules import validate_schedules
from moejax.config.sections.train import validate_train


def validate(config: Config) -> None:
    """Raises `ConfigError` for combinations that cannot work, whatever the number of devices."""
    validate_attention(config.attention, config.model)
    _validate_long_texts(config)
    _validate_shortcut(config)
    _validate_routed_attention(config)
    if config.moe.num_experts:
        _validate_layers(config)
    validate_schedules(config.schedule, config.moe, set(config.layers))
    validate_data(config.data)
    _validate_vocabulary(config)
    validate_train(config.train)
    validate_optimizer(config.optimizer)
    validate_init(config.init)
    validate_upcycling(config.init, config.moe)
    validate_mup(config.mup, config.optimizer.name)
    _validate_mup_of_layers(config)
    validate_alarms(config.alarms)


def _validate_long_texts(config: Config) -> None:
    """Requires whole batches where the longest text decides on the magnitude of all."""
    attention, accumulation = config.attention, config.train.accumulation
    has_long_texts = config.data.seq_len > attention.rope_original_length
    require(
        accumulation == 1 or not (has_long_texts and attention.changes_with_length),
        f"train.accumulation={accumulation} must be 1: with "
        f"attention.rope_long_magnitude={attention.rope_long_magnitude} the longest text of a "
        f"batch decides on the others, and data.seq_len={config.data.seq_len} is above "
        f"attention.rope_original_length={attention.rope_original_length}",
    )


def _validate_mup_of_layers(config: Config) -> None:
    """Requires weights that sum to 1 and one number of experts per token where that is scaled."""
    if not config.mup.base_width or not config.mup.base_top_k or not config.moe.num_experts:
        return
    for kind in filter(None, config.layers):
        require(
            kind.top_k == config.moe.top_k,
            f"mup.base_top_k={config.mup.base_top_k} scales experts for moe.top_k="
            f"{config.moe.top_k}, and moe.per_layer gives a layer {kind.top_k}; leave top_k out of "
            "moe.per_layer, or use mup.base_top_k=0",
        )
        require(
            kind.renormalize,
            f"mup.base_top_k={config.mup.base_top_k} is for weights that sum to 1; use "
            "moe.renormalize=True, or mup.base_top_k=0",
        )


def _validate_shortcut(config: Config) -> None:
    """Requires experts in every layer, for the two dense parts of a layer are not one without."""
    model = config.model
    if not model.shortcut:
        return
    require(
        config.num_moe_layers == model.num_layers,
        f"model.shortcut=True needs experts in every layer, and {config.num_moe_layers} of "
        f"model.num_layers={model.num_layers} have some; set moe.first_dense=0, moe.every=1, and "
        "no dense layer in moe.per_layer, or model.shortcut=False",
    )


def _validate_routed_attention(config: Config) -> None:
    """Requires a MoE layer next to attention by experts: their statistics travel together."""
    model = config.model
    if config.attention.kind != "routed":
        return
    require(
        config.num_moe_layers == model.num_layers,
        f"attention.kind=routed needs experts in every layer, and {config.num_moe_layers} of "
        f"model.num_layers={model.num_layers} have some; set moe.first_dense=0, moe.every=1, and "
        "no dense layer in moe.per_layer, or attention.kind=grouped_query",
    )
    require(
        not model.shortcut,
        "attention.kind=routed with model.shortcut=True: a layer has one router of attention; use "
        "attention.kind=grouped_query or latent, or model.shortcut=False",
    )


def check_vocabulary(config: Config) -> None:
    """Raises `ConfigError` if the tokenizer has more ids than the embedding rows.

    This is for training; a released model may come with no tokenizer, or one of its own.
    """
    num_rows = config.model.vocab_size
    num_ids = config.num_tokenizer_ids
    require(
        not num_rows or num_rows >= num_ids,
        f"model.vocab_size={num_rows} must be at least {num_ids}, the ids of "
        f"data.tokenizer={config.data.tokenizer}; set 0 to have as many",
    )


def _validate_vocabulary(config: Config) -> None:
    """Raises `ConfigError` if the rows of the embedding are unknown."""
    require(
        config.model.vocab_size > 0 or not config.data.has_tokenizer_file,
        f"model.vocab_size=0 cannot be derived from data.tokenizer={config.data.tokenizer} here; "
        "set it to the number of its ids, or more",
    )


def _validate_layers(config: Config) -> None:
    """Checks each distinct MoE layer once; an error names the first layer of its kind."""
    moe = config.moe
    require(
        config.num_moe_layers > 0,
        f"model.num_layers={config.model.num_layers} with moe.first_dense={moe.first_dense}, "
        f"moe.every={moe.every} and moe.per_layer={moe.per_layer!r} leaves no MoE layer; "
        "change them, or set moe.num_experts=0 for a dense model",
    )
    base = dataclasses.replace(moe, per_layer="")
    for kind, layer in _first_layers(config.layers).items():
        try:
            _validate_experts(config, kind)
        except ConfigError as error:
            if kind == base:
                raise
            raise ConfigError(
                f"layer {layer} by moe.per_layer={moe.per_layer!r}: {error}"
            ) from error


def _first_layers(layers: Iterable[MoeConfig | None]) -> dict[MoeConfig, int]:
    """Returns the index of the first layer of each kind of MoE layer."""
    first: dict[MoeConfig, int] = {}
    for layer, kind in enumerate(layers):
        if kind is not None:
            first.setdefault(kind, layer)
    return first


def _validate_experts(config: Config, moe: MoeConfig) -> None:
    """Checks the experts of one layer, whose leaves `moe.per_layer` may have changed."""
    for each in declared().values():
        if each.section == "moe" and each.annotation in (int, float):
            check_range(each.key, getattr(moe, each.name), each.leaf)
    validate_moe(moe)
    require(
        moe.d_expert > 0 or config.moe.d_expert > 0,
        f"model.d_ff={config.model.d_ff} is not a multiple of moe.top_k={config.moe.top_k}, "
        "so moe.d_expert cannot be derived; set moe.d_expert",
    )
    require(moe.d_expert > 0, "moe.d_expert=0 must be at least 1")
