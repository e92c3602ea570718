"""The shape of FlexOlmo 7x7B: 33.3 billion parameters, 24.6 active.

  moejax config --config=configs/published/flex_olmo_7x7b.py

The shape is that of Shi et al. 2025 and of the published checkpoint, whose weights
`moejax.interop.hf` loads. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.vocab_size = 100_352
    config.model.tied_embeddings = False
    config.model.norm_order = "post"
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 32
    config.attention.num_kv_heads = 32
    config.attention.qk_norm = "whole"
    config.attention.rope_theta = 500_000.0
    config.moe.num_experts = 7
    config.moe.top_k = 5
    config.moe.d_expert = 11_008
    config.moe.renormalize = False
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 7
    return config
