"""The shape of DBRX: 131.6 billion parameters, 36.5 active.

  moejax config --config=configs/published/dbrx.py

The shape is that of the published checkpoint (Databricks 2024), whose weights `moejax.interop.hf`
loads. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 40
    config.model.d_model = 6144
    config.model.vocab_size = 100_352
    config.model.tied_embeddings = False
    config.model.norm = "layer_without_bias"
    config.model.norm_epsilon = 1e-5
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 48
    config.attention.num_kv_heads = 8
    config.attention.clip_qkv = 8.0
    config.attention.rope_theta = 500_000.0
    config.moe.num_experts = 16
    config.moe.top_k = 4
    config.moe.d_expert = 10_752
    config.moe.weight_norm = 1.0
    config.moe.jitter = 0.01
    config.moe.balance_weight = 0.05
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 1e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
