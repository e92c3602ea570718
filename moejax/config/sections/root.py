"""The leaves of a configuration, by section, as frozen dataclasses."""

import dataclasses
from typing import Any, Literal

from moejax.config.layer_pattern import LayerGroup, layer_groups, layer_kinds
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import DenseLayer, Derived, any_of, value
from moejax.config.sections.alarms import AlarmConfig
from moejax.config.sections.moe import MoeConfig
from moejax.config.sections.schedules import ScheduleConfig

BYTE_VOCAB_SIZE = 259  # 256 byte values and the ids of padding, begin and end of document


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder around the experts."""

    num_layers: int = leaf(
        4, "layers, each of attention and a feed-forward block", at_least=1, at_most=10_000
    )
    d_model: int = leaf(256, "width of the residual stream", at_least=1)
    num_heads: int = leaf(4, "query heads; the head width is d_model / num_heads", at_least=1)
    num_kv_heads: int = leaf(2, "key and value heads, shared by groups of query heads", at_least=1)
    d_ff: int = leaf(
        1024, "hidden width of the dense feed-forward layers", at_least=1,
        needs=any_of(DenseLayer(), Derived("moe.d_expert")), may_rest=True,
    )  # fmt: skip
    qk_norm: bool = leaf(False, "RMSNorm on queries and keys")
    tied_embeddings: bool = leaf(True, "one matrix for the embedding and the logits")
    rope_theta: float = leaf(10_000.0, "base of the rotary position embedding", at_least=1)
    compute_dtype: Literal["float32", "bfloat16"] = leaf(
        "float32", "in which products are computed; parameters are float32 either way"
    )
    remat: bool = leaf(True, "recompute each layer in the backward pass, but never its routing")
    scan_layers: bool = leaf(
        True, "one program for all equal layers; False unrolls it: longer compile"
    )


SOURCE_ALIASES = dict.fromkeys(
    ("text", "txt", "local", "file", "folder", "json", "jsonl", "parquet", "own"), "files"
)
"""What people write for their own text."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and rows."""

    source: Literal["speeches", "domains", "tfds", "files", "synthetic"] = leaf(
        "speeches", "where text comes from", aliases=SOURCE_ALIASES
    )
    name: str = leaf(
        "", "name (or name/config) of a dataset prepared as ArrayRecord with a `text` feature",
        needs=value("data.source", "tfds"),
    )  # fmt: skip
    source_dir: str = leaf("", "the data_dir of that dataset", needs=value("data.source", "tfds"))
    files: str = leaf(
        "", "a file, a folder, a glob, or several with commas between: docs/your_data.md",
        needs=value("data.source", "files"),
    )  # fmt: skip
    text_field: str = leaf(
        "text",
        "the field of JSON lines and Parquet that holds a document's text",
        needs=value("data.source", "files"),
    )
    directory: str = leaf("data", "where prepared rows are cached")
    tokenizer: Literal["bytes", "bpe"] = leaf(
        "bpe", "tokens are bytes, or pieces that are learned from the text"
    )
    vocab_size: int = leaf(
        4096,
        "pieces of the tokenizer",
        at_least=512,
        at_most=65_536,
        needs=value("data.tokenizer", "bpe"),
    )
    seq_len: int = leaf(256, "tokens of a row", at_least=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = leaf(1000, "optimizer steps", at_least=1)
    batch_size: int = leaf(16, "rows of the global batch", at_least=1)
    accumulation: int = leaf(1, "microbatches per optimizer step", at_least=1)
    seed: int = leaf(
        0, "of the initial weights, the order of rows, and what training draws", at_least=0
    )
    log_every: int = leaf(20, "steps between lines of metrics", at_least=1)
    eval_every: int = leaf(
        250, "steps between evaluations, which are also saved; 0: only at the end", at_least=0
    )
    checkpoint_every: int = leaf(250, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = leaf(
        2,
        "the newest ones that are kept; the best by validation loss is kept beside them",
        at_least=1,
    )
    max_nonfinite_steps: int = leaf(5, "so many skipped steps in a row end the run", at_least=1)
    step_limit_s: float = leaf(
        0.0, "a step that takes longer ends the process with the stacks of its threads; 0: no limit", at_least=0,
        at_most=1e9,
    )  # fmt: skip
    check_memory: bool = leaf(
        True, "refuse, before anything is compiled, what cannot fit the memory of the devices"
    )

    def is_evaluated(self, step: int) -> bool:
        """Whether the state after so many steps is evaluated."""
        return step == self.num_steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def is_saved(self, step: int) -> bool:
        """Whether it is saved: what is evaluated is, too, so that the best evaluation has its checkpoint."""
        return self.is_evaluated(step) or step % self.checkpoint_every == 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = leaf(3e-3, "the highest", at_least=0)
    schedule: Literal["cosine", "linear", "wsd"] = leaf(
        "cosine",
        "how it falls after the warm-up; wsd stays at the highest until the last decay_fraction",
    )
    warmup_fraction: float = leaf(
        0.05, "of num_steps, rising linearly from 0", at_least=0, at_most=1
    )
    decay_fraction: float = leaf(
        0.2,
        "of num_steps, falling linearly at the end",
        at_least=0,
        at_most=1,
        needs=value("optimizer.schedule", "wsd"),
    )
    final_fraction: float = leaf(
        0.1, "the last learning rate over the highest", at_least=0, at_most=1
    )
    beta1: float = leaf(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = leaf(0.95, "decay of the mean of squared gradients", at_least=0, below=1)
    weight_decay: float = leaf(0.1, "decoupled; of matrices alone", at_least=0)
    clip_norm: float = leaf(1.0, "global gradient norm; 0 switches clipping off", at_least=0)


def _axis(default: int, meaning: str) -> Any:
    return leaf(default, meaning, at_least=1, also=(-1,))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis. One size may be -1: all that remain.

    `dcn_*` count the groups of devices (slices, nodes) between which links are slow: an axis has
    `dcn_*` times as many parts as its other size says.
    """

    data: int = _axis(-1, "parts of the batch; -1 in one axis: all devices that remain")
    fsdp: int = _axis(1, "parts of the batch, and of every parameter")
    expert: int = _axis(1, "parts of the batch, and of the experts")
    context: int = _axis(
        1, "parts of each sequence; queries stay where they are, and see the keys and values of all"
    )
    tensor: int = _axis(1, "parts of heads, hidden widths and vocabulary")
    dcn_data: int = _axis(1, "groups between which links are slow, along data")
    dcn_fsdp: int = _axis(1, "the same along fsdp")
    dcn_expert: int = _axis(1, "the same along expert")


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
        return (
            self.data.vocab_size if self.data.tokenizer == "bpe" else -(-BYTE_VOCAB_SIZE // 64) * 64
        )

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
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers as groups of equal ones, each of which is scanned."""
        return layer_groups(self.layers, self.moe.first_dense, self.moe.every)

    @property
    def moe_groups(self) -> tuple[MoeConfig, ...]:
        """The experts of each group of layers that has any."""
        return tuple(group.moe for group in self.layer_groups if group.moe is not None)

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
