"""Trains for seconds, from start to report, on generated text: to see whether a change runs at all.

  moejax train --config=configs/debug.py --workdir=runs/debug

It learns little: expect about 4 bits per byte.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 2
    config.model.d_model = 32
    config.attention.num_heads = 2
    config.attention.num_kv_heads = 1
    config.model.d_ff = 64
    config.model.remat = False
    config.moe.num_experts = 4
    config.moe.top_k = 2
    config.moe.d_expert = 32
    config.data.source = "synthetic"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 64
    config.train.num_steps = 20
    config.train.batch_size = 8
    config.train.log_every = 5
    config.train.eval_every = 10
    config.train.checkpoint_every = 10
    config.optimizer.learning_rate = 1e-2
    config.alarms.collapse = 0.6  # MaxVio, of the largest possible
    config.alarms.dead_experts = 15  # steps; the run is short
    config.alarms.balance_floor = 0.9
    config.alarms.logits = 100.0
    config.alarms.ties = 0.01  # of tokens
    config.alarms.drops = 0.3  # of choices
    config.alarms.entropy = 0.02  # over ln E
    config.alarms.stop = "logits"  # there is no way back from logits that are not finite
    return config
