"""Values and combinations that cannot work, whatever the number of devices."""

import dataclasses

from moejax.config.alarms import validate_alarms
from moejax.config.errors import ConfigError, divisors, require
from moejax.config.moe import validate_moe
from moejax.config.schedules import validate_schedules
from moejax.config.schema import Config


def _require_range(config: Config, low: float, high: float, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not low <= value <= high:  # also refuses NaN
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key}={value} must be {bounds}")


def validate(config: Config) -> None:
    """Raises `ConfigError` for values and combinations that cannot work, whatever the number of devices."""
    inf, largest = float("inf"), 1e30
    _require_range(
        config, 1, inf, "model.num_layers", "model.d_model", "model.num_heads", "model.num_kv_heads", "model.d_ff",
        "data.seq_len", "train.num_steps", "train.batch_size", "train.accumulation", "train.log_every",
        "train.checkpoint_every", "train.keep_checkpoints", "train.max_nonfinite_steps",
    )  # fmt: skip
    _require_range(
        config, 0, largest, "moe.num_experts", "train.eval_every", "train.step_limit_s", "optimizer.learning_rate",
        "optimizer.weight_decay", "optimizer.clip_norm",
    )  # fmt: skip
    _require_range(
        config, 0, 1, "optimizer.final_fraction", "optimizer.beta1", "optimizer.beta2", "optimizer.warmup_fraction",
        "optimizer.decay_fraction",
    )  # fmt: skip
    _require_range(config, 1, largest, "model.rope_theta")
    _require_range(config, 0, 2**31 - 1, "train.seed")
    _validate_moe_ranges(config)
    _validate_model(config)
    if config.moe.num_experts:
        _validate_moe(config)
        _validate_layers(config)
    validate_schedules(config.schedule, config.moe, set(config.layers))
    _validate_data(config)
    _validate_training(config)
    validate_alarms(config.alarms)


def _validate_moe_ranges(config: Config) -> None:
    largest = 1e30
    _require_range(config, 1, largest, "moe.every", "moe.num_groups", "moe.top_k_groups", "moe.sinkhorn_iterations")
    _require_range(
        config, 0, largest, "moe.d_expert", "moe.num_shared_experts", "moe.balance_weight", "moe.z_weight",
        "moe.sequence_balance_weight", "moe.importance_weight", "moe.vmoe_importance_weight", "moe.load_weight",
        "moe.vmoe_load_weight",
        "moe.bias_rate", "moe.noise_scale", "moe.capacity_factor", "moe.eval_capacity_factor", "moe.d_router",
        "moe.d_latent", "moe.num_zero_experts", "moe.num_identity_experts", "moe.num_constant_experts",
        "moe.slots_per_expert", "moe.first_dense",
    )  # fmt: skip
    _require_range(config, 0, 0.99, "moe.jitter", "moe.mixer_threshold", "moe.expert_dropout")
    _require_range(config, 1e-6, 1e6, "moe.route_scale", "moe.activation_limit")


def _validate_moe(config: Config) -> None:
    """The experts of `config.moe`, as those of the whole model or of a layer."""
    _validate_moe_ranges(config)
    validate_moe(config.moe)
    _require_range(config, 1, float("inf"), "moe.d_expert")


def _validate_model(config: Config) -> None:
    model = config.model
    require(
        model.d_model % (2 * model.num_heads) == 0,
        f"model.d_model={model.d_model} must be an even multiple of model.num_heads={model.num_heads}; "
        f"use {2 * model.num_heads * max(1, round(model.d_model / (2 * model.num_heads)))}",
    )
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} must be a multiple of model.num_kv_heads={model.num_kv_heads}; "
        f"use one of {divisors(model.num_heads)} for model.num_kv_heads",
    )


def _validate_layers(config: Config) -> None:
    moe, model = config.moe, config.model
    require(
        config.num_moe_layers > 0,
        f"model.num_layers={model.num_layers} with moe.first_dense={moe.first_dense}, moe.every={moe.every} and "
        f"moe.per_layer={moe.per_layer!r} leaves no MoE layer; change them, or set moe.num_experts=0 for a dense model",
    )
    for layer, kind in enumerate(config.layers):
        if kind is not None and moe.per_layer:
            try:
                _validate_moe(dataclasses.replace(config, moe=kind))
            except ConfigError as error:
                raise ConfigError(f"layer {layer} by moe.per_layer={moe.per_layer!r}: {error}") from error


def _validate_data(config: Config) -> None:
    data = config.data
    if data.tokenizer == "bpe":
        require(
            512 <= data.vocab_size <= 65_536,
            f"data.vocab_size={data.vocab_size} must be between 512 and 65536 for data.tokenizer=bpe",
        )
    if data.source == "tfds":
        require(bool(data.name and data.source_dir), "data.source=tfds needs data.name and data.source_dir")
    if data.source == "files":
        require(bool(data.files), "data.source=files needs data.files, such as a folder or a glob 'texts/*.txt'")
        require(bool(data.text_field), "data.text_field='' must name the field of records that holds their text")


def _validate_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    require(
        train.batch_size % train.accumulation == 0,
        f"train.batch_size={train.batch_size} must be a multiple of train.accumulation={train.accumulation}; "
        f"use one of {divisors(train.batch_size)} for train.accumulation",
    )
    fractions = optimizer.warmup_fraction + (optimizer.decay_fraction if optimizer.schedule == "wsd" else 0.0)
    require(
        fractions <= 1,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and "
        f"optimizer.decay_fraction={optimizer.decay_fraction} must not exceed 1 together; lower one",
    )
