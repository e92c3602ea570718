"""The shape of DeepSeek-V3: 671 billion parameters, 37 active.

  moejax config --config=configs/published/deepseek_v3.py

The shape is that of DeepSeek-AI 2024 and of the published checkpoint, without the layer that
predicts a further token. `moejax.interop.hf` loads its layout in float32 or bfloat16; the published
files, of 8 bits a weight, are refused. Nothing was trained with it.
"""

import math

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 61
    config.model.d_model = 7168
    config.model.d_ff = 18_432
    config.model.vocab_size = 129_280
    config.model.tied_embeddings = False
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.kind = "latent"
    config.attention.num_heads = 128
    config.attention.d_query_latent = 1536
    config.attention.d_kv_latent = 512
    config.attention.d_nope = 128
    config.attention.d_rope = 64
    config.attention.d_value = 128
    config.attention.rope_interleaved = True
    config.attention.rope_scaling = "yarn"
    config.attention.rope_factor = 40.0
    config.attention.rope_original_length = 4096
    config.attention.rope_magnitude = 1.0
    config.attention.score_factor = (0.1 * math.log(40) + 1) ** 2
    config.moe.num_experts = 256
    config.moe.top_k = 8
    config.moe.d_expert = 2048
    config.moe.num_shared_experts = 1
    config.moe.first_dense = 3
    config.moe.router = "sigmoid_topk"
    config.moe.selection_bias = True
    config.moe.num_groups = 8
    config.moe.top_k_groups = 4
    config.moe.route_scale = 2.5
    config.moe.balance_weight = 0.0
    config.moe.sequence_balance_weight = 1e-4
    config.moe.z_weight = 0.0
    config.data.seq_len = 4096
    config.train.batch_size = 15_360
    config.optimizer.learning_rate = 2.2e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 64
    return config
