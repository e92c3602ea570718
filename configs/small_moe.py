"""An hour on two CPU cores, minutes on a GPU: a model large enough for its experts to specialise.

  moejax train --config=configs/small_moe.py --workdir=runs/small_moe

Six layers of width 256: a dense one, then five with 16 experts of which a token visits 2, and a shared one that it
always visits; BPE of 4096; rows of 512 tokens.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    del arg
    config = moejax_config.default()
    config.model.num_layers = 6
    config.model.d_model = 256
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.d_ff = 768
    config.model.qk_norm = True
    config.model.remat = False
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.d_expert = 256
    config.moe.num_shared_experts = 1
    config.moe.first_dense = 1
    config.data.source = "speeches"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096
    config.data.seq_len = 512
    config.train.num_steps = 2000
    config.train.batch_size = 8
    config.train.log_every = 20
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 3e-3
    return config
