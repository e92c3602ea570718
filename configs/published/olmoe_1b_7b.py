"""The shape of OLMoE 1B-7B: 6.92 billion parameters, 1.28 active.

  moejax config --config=configs/published/olmoe_1b_7b.py

The shape is that of Muennighoff et al. 2024 and of the published checkpoint, whose weights
`moejax.interop.hf` loads. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 16
    config.model.d_model = 2048
    config.model.vocab_size = 50_304
    config.model.tied_embeddings = False
    config.model.norm_epsilon = 1e-5
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 16
    config.attention.num_kv_heads = 16
    config.attention.qk_norm = "whole"
    config.moe.num_experts = 64
    config.moe.top_k = 8
    config.moe.d_expert = 1024
    config.moe.renormalize = False
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 4e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
