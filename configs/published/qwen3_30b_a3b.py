"""The shape of Qwen3-30B-A3B: 30.5 billion parameters, 3.3 active.

  moejax config --config=configs/published/qwen3_30b_a3b.py

The shape is that of the published checkpoint, whose weights `moejax.interop.hf` loads. Heads are
wider than d_model / num_heads. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 48
    config.model.d_model = 2048
    config.model.vocab_size = 151_936
    config.model.tied_embeddings = False
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 32
    config.attention.num_kv_heads = 4
    config.attention.head_dim = 128
    config.attention.qk_norm = "head"
    config.attention.rope_theta = 1e6
    config.moe.num_experts = 128
    config.moe.top_k = 8
    config.moe.d_expert = 768
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
