"""Small configurations and batches that the training tests share."""

import dataclasses
from typing import Any

import jax
import numpy as np

from moejax.config import Config, resolve
from moejax.data import Batch
from moejax.sharding import make_mesh
from moejax.training.state import Trainable, make_trainable

SMALL: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 32},
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 16, "balance_weight": 0.1, "z_weight": 0.01},
    "data": {"tokenizer": "bytes", "seq_len": 16, "source": "synthetic"},
    "train": {"batch_size": 8, "num_steps": 4},
    "mesh": {"data": -1},
}


def small_config(**sections: dict[str, Any]) -> Config:
    """`SMALL` with some leaves changed."""
    return resolve({name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}})


def make(config: Config, num_devices: int = 1) -> Trainable:
    """The fixed part of a run on the first devices."""
    return make_trainable(config, make_mesh(config, jax.devices()[:num_devices]))


def packed_batch(config: Config, seed: int = 0) -> Batch:
    """Rows of random tokens with two documents each and padding at the end of some, so that masks matter."""
    rng = np.random.default_rng(seed)
    batch, length = config.train.batch_size, config.data.seq_len
    tokens_BL = rng.integers(3, 200, (batch, length + 1)).astype(np.int32)
    segments_BL = np.ones((batch, length + 1), np.int32)
    segments_BL[:, length // 3 :] = 2
    for row in range(0, batch, 3):
        segments_BL[row, length - 2 - row :] = 0
    positions_BL = np.where(
        np.arange(length + 1) < length // 3, np.arange(length + 1), np.arange(length + 1) - length // 3
    )
    return Batch(
        tokens_BL=tokens_BL[:, :-1],
        targets_BL=tokens_BL[:, 1:],
        segments_BL=segments_BL[:, :-1],
        positions_BL=np.broadcast_to(positions_BL[:-1], (batch, length)).astype(np.int32),
        loss_mask_BL=(segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] > 0),
    )


def replace(config: Config, section: str, **leaves: Any) -> Config:
    """The configuration with some leaves of a section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **leaves)})
