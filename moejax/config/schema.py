"""The leaves of a configuration, by section, as frozen dataclasses."""

import dataclasses
from typing import Any, Literal

from moejax.config.alarms import AlarmConfig
from moejax.config.layers import Run, layer_kinds, runs
from moejax.config.moe import MoeConfig
from moejax.config.schedules import ScheduleConfig

BYTE_VOCAB_SIZE = 259  # 256 byte values and the ids of padding, begin and end of document


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
class DataConfig:
    """Text, tokenizer and rows."""

    source: Literal["speeches", "domains", "tfds", "files", "synthetic"] = "speeches"
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
    step_limit_s: float = 0.0  # a step that takes longer ends the process with the stacks of its threads; 0: no limit

    def is_evaluated(self, step: int) -> bool:
        """Whether the state after so many steps is evaluated."""
        return step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def is_saved(self, step: int) -> bool:
        """Whether it is saved: what is evaluated is, too, so that the best evaluation has its checkpoint."""
        return self.is_evaluated(step) or step % self.checkpoint_every == 0


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
    """Devices by axis. One size may be -1: all that remain.

    `dcn_*` count the groups of devices (slices, nodes) between which links are slow: an axis has `dcn_*` times as many
    parts as its other size says.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1  # of each sequence; queries stay where they are, and see the keys and values of all
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1
    dcn_expert: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved experiment: every leaf final, every combination checked."""

    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    alarms: AlarmConfig = AlarmConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokenizer's ids; for bytes rounded up to 320, which divides well over devices."""
        return self.data.vocab_size if self.data.tokenizer == "bpe" else -(-BYTE_VOCAB_SIZE // 64) * 64

    @property
    def num_token_ids(self) -> int:
        """Ids that are tokens: all rows of the embedding, but those with which bytes are rounded up."""
        return self.data.vocab_size if self.data.tokenizer == "bpe" else BYTE_VOCAB_SIZE

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.model.d_model // self.model.num_heads

    @property
    def layers(self) -> tuple[MoeConfig | None, ...]:
        """Each layer's experts, in the order of the model; None where the layer is dense."""
        return layer_kinds(self.moe, self.model.num_layers, self.data.seq_len)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The same as runs of equal layers, each of which is scanned."""
        return runs(self.layers, self.moe.first_dense, self.moe.every)

    @property
    def moe_runs(self) -> tuple[MoeConfig, ...]:
        """The experts of each run that has any."""
        return tuple(run.moe for run in self.runs if run.moe is not None)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Which layers are MoE layers, counted from 0: what a leading axis `N` of statistics stands for."""
        return tuple(index for index, kind in enumerate(self.layers) if kind is not None)

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward block is a Mixture of Experts."""
        return len(self.moe_layers)


SECTIONS: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Config)}
"""The dataclass of each section."""
