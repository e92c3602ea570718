"""The shape of JetMoE 8B: 8.5 billion parameters, 2.2 active.

  moejax config --config=configs/published/jetmoe_8b.py

The shape is that of Shen et al. 2024 and of the published checkpoint, whose weights
`moejax.interop.hf` loads. Attention has experts, too. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 24
    config.model.d_model = 2048
    config.model.vocab_size = 32_000
    config.model.final_norm_epsilon = 1e-5
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.kind = "routed"
    config.attention.num_query_experts = 8
    config.attention.top_k_query_experts = 2
    config.attention.num_heads = 32
    config.attention.num_kv_heads = 16
    config.attention.head_dim = 128
    config.attention.out_bias = True
    config.attention.router_loss_factor = 2.0
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.d_expert = 5632
    config.moe.output_bias = True
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 5e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
