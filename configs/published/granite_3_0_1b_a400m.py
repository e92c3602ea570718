"""The shape of Granite 3.0 1B-A400M: 1.33 billion parameters, 0.43 active.

  moejax config --config=configs/published/granite_3_0_1b_a400m.py

The shape is that of the published checkpoint (IBM 2024), whose weights `moejax.interop.hf` loads.
Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 24
    config.model.d_model = 1024
    config.model.vocab_size = 49_155
    config.model.embedding_multiplier = 12.0
    config.model.residual_multiplier = 0.22
    config.model.logits_divisor = 6.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 16
    config.attention.num_kv_heads = 8
    config.attention.score_factor = 0.125  # the scale of scores is 1 / 64, that of a head
    config.moe.num_experts = 32
    config.moe.top_k = 8
    config.moe.d_expert = 512
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
