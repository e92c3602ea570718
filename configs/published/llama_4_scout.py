"""The shape of Llama 4 Scout's model of text: 107.8 billion parameters, 17.2 active.

  moejax config --config=configs/published/llama_4_scout.py

The shape is that of the published checkpoint, whose 109 billion parameters include a model of
images (0.9 billion). `moejax.interop.hf` loads the weights of the text's and leaves out those of
the images'. Every fourth layer sees all of a text, without rotary positions; the others see chunks
of 8,192 tokens. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 48
    config.model.d_model = 5120
    config.model.d_ff = 16_384
    config.model.vocab_size = 202_048
    config.model.tied_embeddings = False
    config.model.norm_epsilon = 1e-5
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.num_heads = 40
    config.attention.num_kv_heads = 8
    config.attention.head_dim = 128
    config.attention.qk_norm = "unweighted"
    config.attention.qk_norm_after_rope = True
    config.attention.qk_norm_layers = "rope"
    config.attention.chunk = 8192
    config.attention.chunk_layers = "chunk, chunk, chunk, full"
    config.attention.temperature = 0.1
    config.attention.temperature_length = 8192
    config.attention.rope_interleaved = True
    config.attention.rope_layers = "rope, rope, rope, none"
    config.attention.rope_theta = 500_000.0
    config.attention.rope_scaling = "llama3"
    config.attention.rope_factor = 16.0
    config.attention.rope_original_length = 8192
    config.attention.rope_beta_fast = 1.0
    config.attention.rope_beta_slow = 1.0
    config.moe.num_experts = 16
    config.moe.top_k = 1
    config.moe.d_expert = 8192
    config.moe.num_shared_experts = 1
    config.moe.router = "sigmoid_topk"
    config.moe.renormalize = False
    config.moe.weight_on = "input"
    config.data.seq_len = 8192
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 16
    return config
