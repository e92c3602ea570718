"""The configuration of an experiment: its sections, and what follows from several of them."""

import dataclasses
import math
from typing import Any

from moejax.config.layer_pattern import LayerGroup, layer_groups, layer_kinds
from moejax.config.loss_specs import LOSS_SPECS
from moejax.config.sections.alarms import AlarmConfig
from moejax.config.sections.attention import AttentionConfig
from moejax.config.sections.data import BYTE_VOCAB_SIZE, DataConfig
from moejax.config.sections.init import InitConfig
from moejax.config.sections.mesh import MeshConfig
from moejax.config.sections.model import ModelConfig
from moejax.config.sections.moe import MoeConfig
from moejax.config.sections.mup import MupConfig
from moejax.config.sections.optimizer import OptimizerConfig
from moejax.config.sections.schedules import ScheduleConfig
from moejax.config.sections.train import TrainConfig

BYTE_EMBEDDING_ROWS = 64 * math.ceil(BYTE_VOCAB_SIZE / 64)
"""320: the byte vocabulary, padded to a multiple of 64, which divides well over devices."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved experiment: every leaf final, every combination checked."""

    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoeConfig = MoeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init: InitConfig = InitConfig()
    mup: MupConfig = MupConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    alarms: AlarmConfig = AlarmConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokenizer's ids, which are padded for bytes, if not set."""
        if self.model.vocab_size:
            return self.model.vocab_size
        return self.data.vocab_size if self.data.tokenizer == "bpe" else BYTE_EMBEDDING_ROWS

    @property
    def num_token_ids(self) -> int:
        """Ids that are tokens: all rows of the embedding but the padding for bytes."""
        return self.model.vocab_size or self.num_tokenizer_ids

    @property
    def num_tokenizer_ids(self) -> int:
        """Ids of the tokenizer; if it is a file, the rows of the embedding, which are as many."""
        if self.data.has_tokenizer_file:
            return self.model.vocab_size
        return self.data.vocab_size if self.data.tokenizer == "bpe" else BYTE_VOCAB_SIZE

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.attention.head_dim or self.model.d_model // self.attention.num_heads

    @property
    def attention_router(self) -> MoeConfig:
        """The router of attention by experts, with the auxiliary losses of the MoE layers."""
        weights: dict[str, Any] = {}
        for name, spec in LOSS_SPECS.items():
            fits = "softmax_topk" in spec.fitting_routers
            weights[f"{name}_weight"] = getattr(self.moe, f"{name}_weight") if fits else 0.0
        return dataclasses.replace(
            MoeConfig(),
            num_experts=self.attention.num_query_experts,
            top_k=self.attention.top_k_query_experts,
            score="softmax",
            balance_scope=self.moe.balance_scope,
            balance_convention=self.moe.balance_convention,
            **weights,
        )

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
        """Indices of the MoE layers, from 0: the leading axis `N` of statistics."""
        return tuple(index for index, kind in enumerate(self.layers) if kind is not None)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers whose feed-forward block is a Mixture of Experts."""
        return len(self.moe_layers)


SECTIONS: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Config)}
"""The dataclass of each section."""
