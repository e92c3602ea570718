"""The dense control of `tiny_moe.py`: equal active parameters, data, steps and optimizer.

  make train CONFIG=configs/tiny_dense.py
  moejax train --config=configs/tiny_dense.py --workdir=runs/tiny_dense

Its feed-forward layers are as wide as the two experts that a token of the MoE visits, so that what
the MoE gains over it comes from parameters that cost no arithmetic. Only `moe.*` differs from
`tiny_moe.py` (tested). Expect 1.57 bits per byte.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 4
    config.model.d_model = 128
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 2
    config.model.d_ff = 512  # as wide as two experts of tiny_moe.py
    config.model.remat = False  # activations are small, recomputing them is not
    config.moe.num_experts = 0
    config.data.source = "speeches"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.seq_len = 256
    config.train.num_steps = 400
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.checkpoint_every = 100
    config.optimizer.learning_rate = 5e-3
    return config
