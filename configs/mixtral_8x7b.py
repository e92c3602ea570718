"""The shape of Mixtral 8x7B, to plan a run on a pod: 46.7 billion parameters, 12.9 active.

  moejax bench compiled_step --target=v5p --topology=4x4x4 --config=configs/mixtral_8x7b.py

The shape is that of Jiang et al. 2024. The command is for 64 chips of TPU v5p, 49,152 tokens each,
with an expert of each layer on a chip. For other meshes add
`--config.mesh.fsdp=16 --config.mesh.expert=4`. Nothing was trained with it. What its step holds and
sends is in docs/traffic.md.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.attention.num_heads = 32
    config.attention.num_kv_heads = 8
    config.model.d_ff = 28672  # of the dense twin
    config.model.tied_embeddings = False
    config.attention.rope_theta = 1e6
    config.model.compute_dtype = "bfloat16"
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.d_expert = 14336
    config.moe.exchange_buffer = 1.25
    config.moe.exchange_chunks = 4
    config.moe.save_exchanged = False  # 32 layers of what arrived would be 32 GB
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32_000
    config.data.seq_len = 4096
    config.train.batch_size = 768  # 12 rows a chip
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
