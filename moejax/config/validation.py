"""Values and combinations that cannot work, whatever the number of devices."""

import dataclasses

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.moe_rules import validate_moe
from moejax.config.schema.leaf import check_range
from moejax.config.schema.tree import declared
from moejax.config.sections.alarms import validate_alarms
from moejax.config.sections.moe import MoeConfig
from moejax.config.sections.root import Config
from moejax.config.sections.schedules import validate_schedules


def validate(config: Config) -> None:
    """Raises `ConfigError` for combinations that cannot work, whatever the number of devices."""
    _validate_model(config)
    if config.moe.num_experts:
        _validate_layers(config)
    validate_schedules(config.schedule, config.moe, set(config.layers))
    _validate_data(config)
    _validate_training(config)
    validate_alarms(config.alarms)


def _validate_model(config: Config) -> None:
    model = config.model
    require(
        model.d_model % (2 * model.num_heads) == 0,
        f"model.d_model={model.d_model} must be an even multiple of model.num_heads={model.num_heads}; "
        f"use {2 * model.num_heads * max(1, round(model.d_model / (2 * model.num_heads)))}",
    )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} must be a multiple of model.num_kv_heads={model.num_kv_heads}; "
            f"use one of {divisors(model.num_heads, model.num_kv_heads)} for model.num_kv_heads"
        )


def _validate_layers(config: Config) -> None:
    moe, model = config.moe, config.model
    require(
        config.num_moe_layers > 0,
        f"model.num_layers={model.num_layers} with moe.first_dense={moe.first_dense}, moe.every={moe.every} and "
        f"moe.per_layer={moe.per_layer!r} leaves no MoE layer; change them, or set moe.num_experts=0 for a dense model",
    )
    base = dataclasses.replace(moe, per_layer="")
    first: dict[MoeConfig, int] = {}
    for layer, kind in enumerate(config.layers):
        if kind is not None:
            first.setdefault(kind, layer)
    for kind, layer in first.items():
        try:
            _validate_experts(config, kind)
        except ConfigError as error:
            if kind == base:
                raise
            raise ConfigError(
                f"layer {layer} by moe.per_layer={moe.per_layer!r}: {error}"
            ) from error


def _validate_experts(config: Config, moe: MoeConfig) -> None:
    """The experts of one layer."""
    for each in declared().values():
        if each.section == "moe" and each.annotation in (int, float):
            check_range(each.key, getattr(moe, each.name), each.leaf)
    validate_moe(moe)
    if moe.d_expert == 0 and config.moe.d_expert == 0:
        raise ConfigError(
            f"model.d_ff={config.model.d_ff} is not a multiple of moe.top_k={config.moe.top_k}, so moe.d_expert cannot "
            "be derived; set moe.d_expert"
        )
    require(moe.d_expert > 0, "moe.d_expert=0 must be at least 1")


def _validate_data(config: Config) -> None:
    data = config.data
    if data.source == "tfds":
        require(
            bool(data.name and data.source_dir),
            "data.source=tfds needs data.name and data.source_dir",
        )
    if data.source == "files":
        require(
            bool(data.files),
            "data.source=files needs data.files, such as a folder or a glob 'texts/*.txt'",
        )
        require(
            bool(data.text_field),
            "data.text_field='' must name the field of records that holds their text",
        )


def _validate_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    if train.batch_size % train.accumulation:
        raise ConfigError(
            f"train.batch_size={train.batch_size} must be a multiple of train.accumulation={train.accumulation}; "
            f"use one of {divisors(train.batch_size, train.accumulation)} for train.accumulation"
        )
    fractions = optimizer.warmup_fraction + (
        optimizer.decay_fraction if optimizer.schedule == "wsd" else 0.0
    )
    require(
        fractions <= 1,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and "
        f"optimizer.decay_fraction={optimizer.decay_fraction} must not exceed 1 together; lower one",
    )
