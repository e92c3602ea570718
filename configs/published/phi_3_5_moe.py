"""The shape of Phi-3.5-MoE: 41.9 billion parameters, 6.6 active.

  moejax config --config=configs/published/phi_3_5_moe.py

The shape is that of Abdin et al. 2024 and of the published checkpoint, whose weights
`moejax.interop.hf` loads, with plain rotary positions in place of LongRoPE, whose many factors are
in its `config.json`. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.vocab_size = 32_064
    config.model.tied_embeddings = False
    config.model.norm = "layer"
    config.model.norm_epsilon = 1e-5
    config.model.logits_bias = True
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 32
    config.attention.num_kv_heads = 8
    config.attention.qkv_bias = True
    config.attention.out_bias = True
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.d_expert = 6400
    config.moe.router = "sparse_mixer"
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
