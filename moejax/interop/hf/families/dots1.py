"""dots.llm1 (Huo et al. 2025)."""

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Key
from moejax.interop.hf.llama import ATTENTION, DECODER, NORMS, OUTER, QK_NORM, feed_forward
from moejax.interop.hf.shared.sigmoid_router import SIGMOID_MOE, sigmoid_router
from moejax.interop.hf.shared.windows import Windows, on_last_layers

FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    keys=(
        *DECODER,
        ATTENTION_BIAS,
        Windows(on_last_layers, width=4096, max_window_layers=62, chooses_layers=True),
        Key("rope_theta", "attention.rope_theta", default=1e4),
        Always("attention.qk_norm", "head"),
        *sigmoid_router(
            {
                "first_k_dense_replace": 0,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
            }
        ),
    ),
    outer=OUTER,
    layer=(*NORMS, *ATTENTION, *BIASES, *QK_NORM),
    dense=feed_forward("mlp", "ffn"),
    moe=SIGMOID_MOE,
)
