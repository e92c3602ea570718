"""The shape of Qwen1.5-MoE-A2.7B: 14.3 billion parameters, 2.7 active.

  moejax config --config=configs/published/qwen1_5_moe_a2_7b.py

The shape is that of the published checkpoint, whose weights `moejax.interop.hf` loads. Four shared
experts are one network of four times the width. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 24
    config.model.d_model = 2048
    config.model.vocab_size = 151_936
    config.model.tied_embeddings = False
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 16
    config.attention.num_kv_heads = 16
    config.attention.qkv_bias = True
    config.attention.rope_theta = 1e6
    config.moe.num_experts = 60
    config.moe.top_k = 4
    config.moe.d_expert = 1408
    config.moe.num_shared_experts = 1
    config.moe.d_shared = 5632
    config.moe.shared_combine = "gated"
    config.moe.renormalize = False
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 4
    return config
