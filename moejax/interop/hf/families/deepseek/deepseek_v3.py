"""DeepSeek-V3 and R1 (DeepSeek-AI 2024) and Moonlight, also in FP8."""

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Ignored, Key
from moejax.interop.hf.llama import BASE, NORMS, OUTER, feed_forward
from moejax.interop.hf.shared.further_layers import is_of_further_layers
from moejax.interop.hf.shared.latent_attention import LATENT_ATTENTION, LATENT_TENSORS
from moejax.interop.hf.shared.sigmoid_router import SIGMOID_MOE, sigmoid_router

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *BASE,
        *LATENT_ATTENTION,
        Key("rope_interleave", "attention.rope_interleaved", default=True),
        *sigmoid_router(),
        Ignored("aux_loss_alpha", "ep_size", "head_dim", "num_nextn_predict_layers"),
        Ignored("qk_head_dim", "seq_aux"),
    ),
    outer=OUTER,
    layer=(*NORMS, *LATENT_TENSORS),
    dense=feed_forward("mlp", "ffn"),
    moe=SIGMOID_MOE,
    is_ignored=is_of_further_layers,
)
