"""The shape of LongCat-Flash: 560 billion parameters, of which a token uses 19 to 31.

  moejax config --config=configs/published/longcat_flash.py

The shape is that of Meituan 2025 and of the published checkpoint, without the layer that predicts a
further token, whose weights `moejax.interop.hf` loads. A layer has attention and a dense network
twice, and experts beside them, of which a third are identities. Nothing was trained with it.
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = moejax_config.default()
    config.model.num_layers = 28
    config.model.d_model = 6144
    config.model.d_ff = 12_288
    config.model.vocab_size = 131_072
    config.model.tied_embeddings = False
    config.model.norm_epsilon = 1e-5
    config.model.shortcut = True
    config.model.embedding_multiplier = 1.0
    config.model.compute_dtype = "bfloat16"
    config.attention.kind = "latent"
    config.attention.num_heads = 64
    config.attention.d_query_latent = 1536
    config.attention.d_kv_latent = 512
    config.attention.d_nope = 128
    config.attention.d_rope = 64
    config.attention.d_value = 128
    config.attention.scale_latents = True
    config.attention.rope_interleaved = True
    config.attention.rope_theta = 10_000_000.0
    config.moe.num_experts = 512
    config.moe.num_identity_experts = 256
    config.moe.top_k = 12
    config.moe.d_expert = 2048
    config.moe.renormalize = False
    config.moe.route_scale = 6.0
    config.moe.selection_bias = True
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 2e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 64
    return config
