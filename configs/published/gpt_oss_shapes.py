"""The shapes of gpt-oss: 20.9 billion parameters, 3.6 active, or 116.8 and 5.1.

  moejax config --config=configs/published/gpt_oss_shapes.py
  moejax config --config=configs/published/gpt_oss_shapes.py:120b

The shape is that of the published checkpoint, in whose layers a window of 128 tokens and full
attention take turns. `moejax.interop.hf` loads its layout in float32 or bfloat16; the published
files, whose experts have 4 bits a weight, are refused. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config

SIZES = {"20b": (24, 32), "120b": (36, 128)}
"""Layers, and experts of each."""


def get_config(size: str = "20b") -> ConfigDict:
    """Returns the recipe of a size: 20b or 120b."""
    if size not in SIZES:
        raise ValueError(f"gpt-oss has no size {size}; use {' or '.join(SIZES)}")
    num_layers, num_experts = SIZES[size]
    config = moejax_config.default()
    config.model.num_layers = num_layers
    config.model.d_model = 2880
    config.model.vocab_size = 201_088
    config.model.tied_embeddings = False
    config.model.norm_epsilon = 1e-5
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 64
    config.attention.num_kv_heads = 8
    config.attention.head_dim = 64
    config.attention.qkv_bias = True
    config.attention.out_bias = True
    config.attention.window = 128
    config.attention.window_layers = "window, full"
    config.attention.sinks = True
    config.attention.rope_theta = 150_000.0
    config.attention.rope_scaling = "yarn"
    config.attention.rope_factor = 32.0
    config.attention.rope_original_length = 4096
    config.attention.rope_truncate = False
    config.moe.num_experts = num_experts
    config.moe.top_k = 4
    config.moe.d_expert = 2880
    config.moe.score = "softmax_after"
    config.moe.router_bias = True
    config.moe.expert_bias = True
    config.moe.activation = "clamped_swiglu"
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
