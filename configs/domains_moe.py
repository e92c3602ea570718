"""A small MoE on five domains that share few words, to study what its experts specialise in.

  moejax train --config=configs/domains_moe.py --workdir=runs/domains_moe

Speeches, drama, a Bible in English and one in Japanese, and code: 41 MB, fetched once by their
hashes. Four layers of width 128 with 16 experts each, of which a token visits 2; BPE of 4096.
There are many evaluations, to see when routing settles. It takes about 12 minutes on two CPU cores.

Expected: 3.65 to 3.67 nats per token, 1.78 to 1.80 bits per byte, MaxVio 0.19 to 0.25 on the
validation split (seeds 0 to 2); the dense twin has 3.72 (seed 0). What the experts specialise in:
docs/specialisation.md.
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
    config.model.d_ff = 256  # of the dense twin; two experts of half the width cost as much
    config.model.remat = False
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.d_expert = 128
    config.data.source = "domains"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096
    config.data.seq_len = 256
    config.train.num_steps = 800
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 160
    config.train.checkpoint_every = 160
    config.optimizer.learning_rate = 5e-3
    return config
