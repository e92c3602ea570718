"""Experts split over devices: tokens are sent to the experts they chose, and results return.

  export XLA_FLAGS=--xla_force_host_platform_device_count=4
  MESH="--config.mesh.data=1 --config.mesh.expert=4"
  moejax train --config=configs/expert_parallel.py --workdir=runs/ep $MESH

Each of four fake CPU devices holds some of the experts. On one device leave out the flags for the
mesh: the loss is the same, 1.793 on held-out text. There are sixteen experts in each of two layers,
and the text is generated; it takes a minute.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 2
    config.model.d_model = 64
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 2
    config.model.d_ff = 128
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.d_expert = 64
    config.moe.exchange = "all_to_all"
    # A load that is more uneven than this makes a step slower, and drops nothing.
    config.moe.exchange_buffer = 1.5
    # One half of a device's tokens can be sent while the other is computed.
    config.moe.exchange_chunks = 2
    # False takes less memory, and sends the tokens again in the backward pass.
    config.moe.save_exchanged = True
    config.data.source = "synthetic"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 64
    config.train.num_steps = 40
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 40
    config.train.checkpoint_every = 40
    config.optimizer.learning_rate = 1e-2
    return config
