"""Top-k by softmax with renormalised weights, as in Mixtral; the base of the other recipes here.

  moejax train --config=configs/routers/softmax_topk.py --workdir=runs/routers/softmax_topk

Two layers of width 128 with 16 experts of width 128, of which a token visits 2; BPE of 2048 on
presidential addresses; rows of 128 tokens, 200 steps of 16 rows. It takes a minute on two CPU
cores. `docs/routers.md` compares what all of them reach.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 2
    config.model.d_model = 128
    config.attention.num_heads = 4
    config.attention.num_kv_heads = 2
    config.model.d_ff = 256
    config.model.remat = False
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.d_expert = 128
    config.data.source = "speeches"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.seq_len = 128
    config.train.num_steps = 200
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.optimizer.learning_rate = 5e-3
    return config
