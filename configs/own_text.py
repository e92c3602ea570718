"""The reader's own text: a folder, a glob, JSON lines or Parquet. docs/your_data.md shows how.

  moejax train --config=configs/own_text.py --config.data.files=my_texts --workdir=runs/own_text

Without `data.files` it trains on the documentation of this repository, from its root: 0.1 MB of
text, which it learns by heart. It takes minutes on two CPU cores. Raise `train.num_steps` with the
amount of text.
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
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.d_expert = 128
    config.moe.balance_weight = 0.01
    config.data.source = "files"
    config.data.files = "docs"  # a folder, a file, a glob, or several separated by commas
    config.data.text_field = "text"  # of JSON lines and Parquet
    config.data.tokenizer = "bytes"  # nothing to learn; "bpe" reads about four bytes a token
    config.data.seq_len = 128
    config.train.num_steps = 200
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.optimizer.learning_rate = 3e-3
    return config
