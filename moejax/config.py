"""The experiment's configuration: frozen dataclasses, their validation, and the traced scalars.

A recipe in `configs/` returns a `ConfigDict` that holds every leaf (`default()`); `resolve` turns it into a frozen
`Config`, derives what is derived and refuses what cannot work, before anything is traced. Scalars that change no
array shape travel apart, in one `Knobs` pytree, so that changing them recompiles nothing.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

BYTE_VOCAB_SIZE = 259  # 256 byte values and the ids of padding, begin and end of document


class ConfigError(ValueError):
    """A configuration that cannot work: the message names the key, the value, the constraint and the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder around the experts."""

    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4  # query heads; the head width is d_model / num_heads
    num_kv_heads: int = 2  # key and value heads, shared by groups of query heads
    d_ff: int = 1024  # hidden width of the dense feed-forward layers
    qk_norm: bool = False  # RMSNorm on queries and keys
    tied_embeddings: bool = True
    rope_theta: float = 10_000.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters are float32 either way
    remat: bool = True  # recompute each layer in the backward pass, but never its routing
    scan_layers: bool = True  # False unrolls the scan: longer compile, same parameters


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The Mixture-of-Experts layers. `num_experts=0` is the dense control."""

    num_experts: int = 8
    top_k: int = 2
    d_expert: int = 0  # hidden width of one expert; 0 derives d_ff / top_k: the active parameters of the dense twin
    num_shared_experts: int = 0  # experts of width d_expert that every token visits
    router: Literal["softmax_topk", "switch"] = "softmax_topk"
    renormalize: bool = True  # make the selected weights sum to 1
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.25  # slots per expert over a perfectly balanced load; used by dispatch="capacity"
    grouped_matmul: Literal["auto", "tiled", "ragged", "dense"] = "auto"
    first_dense: int = 0  # this many first layers are dense
    every: int = 1  # of the rest, every n-th layer is MoE
    balance_weight: float = 0.01
    z_weight: float = 1e-3


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and rows."""

    source: Literal["speeches", "tfds", "files", "synthetic"] = "speeches"
    name: str = ""  # source="tfds": name (or name/config) of a dataset prepared as ArrayRecord with a `text` feature
    source_dir: str = ""  # source="tfds": its data_dir
    files: str = ""  # source="files": a glob of UTF-8 text files, one document each
    directory: str = "data"  # prepared rows are cached here
    tokenizer: Literal["bytes", "bpe"] = "bpe"
    vocab_size: int = 4096  # tokenizer="bpe"
    seq_len: int = 256


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 1000
    batch_size: int = 16  # rows of the global batch
    accumulation: int = 1  # microbatches per optimizer step
    seed: int = 0
    log_every: int = 20
    eval_every: int = 250  # 0: only at the end; what is evaluated is also saved
    checkpoint_every: int = 250
    keep_checkpoints: int = 2  # the newest ones; the best by validation loss is kept beside them
    max_nonfinite_steps: int = 5  # so many skipped steps in a row end the run


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-3
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_fraction: float = 0.05  # of num_steps, rising linearly from 0
    decay_fraction: float = 0.2  # schedule="wsd": of num_steps, falling linearly at the end
    final_fraction: float = 0.1  # the last learning rate over the highest
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis. One size may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved experiment: every leaf final, every combination checked."""

    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokenizer's ids; for bytes rounded up to 320, which divides well over devices."""
        return self.data.vocab_size if self.data.tokenizer == "bpe" else -(-BYTE_VOCAB_SIZE // 64) * 64

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.model.d_model // self.model.num_heads

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward block is a Mixture of Experts."""
        if self.moe.num_experts == 0:
            return 0
        return (self.model.num_layers - self.moe.first_dense) // self.moe.every


SECTIONS: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Config)}
"""The dataclass of each section."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """Traced float32 scalars: they change no shape, so changing them recompiles nothing and they can be `vmap`ped.

    Attributes:
      learning_rate_scale: multiplies the scheduled learning rate.
      balance_weight: coefficient of each layer's balance loss.
      z_weight: coefficient of each layer's router z-loss.
      capacity_factor: limits the slots used per expert; buffers have the size of `moe.capacity_factor`, so larger
        values have no effect.
    """

    learning_rate_scale: jax.Array
    balance_weight: jax.Array
    z_weight: jax.Array
    capacity_factor: jax.Array

    @classmethod
    def of(cls, config: Config) -> "Knobs":
        """The knobs as the configuration sets them."""
        return cls(
            learning_rate_scale=jnp.float32(1.0),
            balance_weight=jnp.float32(config.moe.balance_weight),
            z_weight=jnp.float32(config.moe.z_weight),
            capacity_factor=jnp.float32(config.moe.capacity_factor),
        )


def default() -> ConfigDict:
    """Every leaf with its default value, locked: what recipes in `configs/` start from."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ConfigDict:
    """The same leaves as a locked `ConfigDict`."""
    return ConfigDict(to_dict(config)).lock()


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The same leaves as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def leaves() -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, annotated type) of every leaf."""
    for section, make in SECTIONS.items():
        for name, annotation in typing.get_type_hints(make).items():
            yield f"{section}.{name}", annotation


def check_key(key: str) -> None:
    """Raises `ConfigError` naming the nearest key if `key` (dotted, without `config.`) is no leaf."""
    known = [name for name, _ in leaves()]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key} is not a config key; the nearest is {near}")


def resolve(source: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` or nested mapping into a checked `Config`.

    Args:
      source: sections of leaves; sections and leaves that are absent take their defaults.

    Returns:
      A `Config` with derived leaves filled in (`moe.d_expert`).

    Raises:
      ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    values = source.to_dict() if isinstance(source, ConfigDict) else source
    for name in values:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{name} is not a config section; the nearest is {near}")
    sections = {}
    for section, make in SECTIONS.items():
        given, hints = values.get(section, {}), typing.get_type_hints(make)
        if not isinstance(given, Mapping):
            raise ConfigError(f"{section}={given!r} is no section of leaves; set leaves such as {_first_leaf(section)}")
        for name in given:
            check_key(f"{section}.{name}")
        sections[section] = make(
            **{name: _checked(f"{section}.{name}", value, hints[name]) for name, value in given.items()}
        )
    config = _derive(Config(**sections))
    validate(config)
    return config


def _first_leaf(section: str) -> str:
    return next(key for key, _ in leaves() if key.startswith(f"{section}."))


def _checked(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type, or a `ConfigError`."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(choices)}; the nearest is {near}")
        return value
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}={value!r} is {type(value).__name__}; it must be {annotation.__name__}")
    return value


def _derive(config: Config) -> Config:
    moe = config.moe
    if moe.num_experts and moe.d_expert == 0 and 0 < moe.top_k <= moe.num_experts:
        if config.model.d_ff % moe.top_k:
            raise ConfigError(
                f"model.d_ff={config.model.d_ff} is not a multiple of moe.top_k={moe.top_k}, so moe.d_expert cannot be "
                "derived; set moe.d_expert"
            )
        moe = dataclasses.replace(moe, d_expert=config.model.d_ff // moe.top_k)
    return dataclasses.replace(config, moe=moe)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_range(config: Config, low: float, high: float, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not low <= value <= high:  # also refuses NaN
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key}={value} must be {bounds}")


def validate(config: Config) -> None:
    """Raises `ConfigError` for values and combinations that cannot work, whatever the number of devices."""
    inf = float("inf")
    largest = 1e30
    _require_range(
        config, 1, inf, "model.num_layers", "model.d_model", "model.num_heads", "model.num_kv_heads", "model.d_ff",
        "data.seq_len", "train.num_steps", "train.batch_size", "train.accumulation", "train.log_every",
        "train.checkpoint_every", "train.keep_checkpoints", "train.max_nonfinite_steps", "moe.every",
    )  # fmt: skip
    _require_range(
        config, 0, largest, "moe.num_experts", "moe.d_expert", "moe.num_shared_experts", "moe.balance_weight",
        "moe.z_weight", "moe.capacity_factor", "moe.first_dense", "train.eval_every", "optimizer.learning_rate",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
    )  # fmt: skip
    _require_range(
        config, 0, 1, "optimizer.final_fraction", "optimizer.beta1", "optimizer.beta2", "optimizer.warmup_fraction",
        "optimizer.decay_fraction",
    )  # fmt: skip
    _require_range(config, 1, largest, "model.rope_theta")
    _require_range(config, 0, 2**31 - 1, "train.seed")
    _validate_model(config)
    if config.moe.num_experts:
        _validate_moe(config)
    _validate_data(config)
    _validate_training(config)


def _validate_model(config: Config) -> None:
    model = config.model
    _require(
        model.d_model % (2 * model.num_heads) == 0,
        f"model.d_model={model.d_model} must be an even multiple of model.num_heads={model.num_heads}; "
        f"use {2 * model.num_heads * max(1, round(model.d_model / (2 * model.num_heads)))}",
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} must be a multiple of model.num_kv_heads={model.num_kv_heads}; "
        f"use one of {divisors(model.num_heads)} for model.num_kv_heads",
    )


def _validate_moe(config: Config) -> None:
    moe, model = config.moe, config.model
    _require(
        1 <= moe.top_k <= moe.num_experts,
        f"moe.top_k={moe.top_k} must be between 1 and moe.num_experts={moe.num_experts}",
    )
    _require(
        moe.router != "switch" or moe.top_k == 1,
        f"moe.router=switch sends a token to one expert, so moe.top_k={moe.top_k} must be 1; or use softmax_topk",
    )
    _require(
        not (moe.top_k == 1 and moe.renormalize),
        "moe.renormalize=True with moe.top_k=1 makes every weight 1 and the task gradient of the router 0; "
        "set moe.renormalize=False",
    )
    _require(
        config.num_moe_layers > 0,
        f"model.num_layers={model.num_layers} with moe.first_dense={moe.first_dense} and moe.every={moe.every} leaves "
        "no MoE layer; lower them, or set moe.num_experts=0 for a dense model",
    )
    _require(
        moe.dispatch != "capacity" or 0 < moe.capacity_factor <= moe.num_experts,
        f"moe.capacity_factor={moe.capacity_factor} must be above 0 and at most moe.num_experts={moe.num_experts}, "
        "where one expert could take every token",
    )


def _validate_data(config: Config) -> None:
    data = config.data
    if data.tokenizer == "bpe":
        _require(
            512 <= data.vocab_size <= 65_536,
            f"data.vocab_size={data.vocab_size} must be between 512 and 65536 for data.tokenizer=bpe",
        )
    if data.source == "tfds":
        _require(bool(data.name and data.source_dir), "data.source=tfds needs data.name and data.source_dir")
    if data.source == "files":
        _require(bool(data.files), "data.source=files needs data.files, a glob such as 'texts/*.txt'")


def _validate_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    _require(
        train.batch_size % train.accumulation == 0,
        f"train.batch_size={train.batch_size} must be a multiple of train.accumulation={train.accumulation}; "
        f"use one of {divisors(train.batch_size)} for train.accumulation",
    )
    fractions = optimizer.warmup_fraction + (optimizer.decay_fraction if optimizer.schedule == "wsd" else 0.0)
    _require(
        fractions <= 1,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and "
        f"optimizer.decay_fraction={optimizer.decay_fraction} must not exceed 1 together; lower one",
    )


def divisors(number: int) -> str:
    """The divisors of `number`, for error messages: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
