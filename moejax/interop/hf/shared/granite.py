"""What the families of Granite share: multipliers, and experts as one tensor a projection."""

import math
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.attention_bias import ATTENTION_BIAS, BIASES
from moejax.interop.hf.keys import Always, Entry, Key, Leaves, Mapped, first_of
from moejax.interop.hf.llama import ATTENTION, DECODER, NORMS, experts_per_token
from moejax.interop.hf.tensors import Tensor


def _read_score_factor(published: Mapping[str, Any]) -> Leaves:
    """Returns the factor on scores: their scale is the multiplier alone, without a root."""
    heads = first_of(published, ("num_attention_heads",))
    width = first_of(published, ("head_dim",), first_of(published, ("hidden_size",)) // heads)
    multiplier = first_of(published, ("attention_multiplier",), 1.0)
    # To as many digits as survive the division by the root on the way back.
    factor = float(f"{multiplier * math.sqrt(width):.12g}")
    return {"attention.score_factor": factor}


def _write_score_factor(leaves: Leaves) -> dict[str, Any]:
    heads = leaves["attention.num_heads"]
    width = leaves["attention.head_dim"] or leaves["model.d_model"] // heads
    return {"attention_multiplier": leaves["attention.score_factor"] / math.sqrt(width)}


SCORE_FACTOR = Mapped(("attention_multiplier",), _read_score_factor, _write_score_factor)

GRANITE: tuple[Entry, ...] = (
    *DECODER,  # whose embedding multiplier, 1, is overruled below
    *experts_per_token(Always("moe.renormalize", True), "num_local_experts", "num_experts"),
    ATTENTION_BIAS,
    SCORE_FACTOR,
    Key("intermediate_size", "moe.d_expert"),
    Key("rope_theta", "attention.rope_theta", default=1e4),
    Key("embedding_multiplier", "model.embedding_multiplier", default=1.0),
    Key("residual_multiplier", "model.residual_multiplier", default=1.0),
    Key("logits_scaling", "model.logits_divisor", default=1.0),
)
"""Keys; a softmax over the chosen logits is that over all logits, renormalised."""

LAYER = (*NORMS, *ATTENTION, *BIASES)


def fused_feed_forward(theirs: str, ours: str, experts: str = "") -> tuple[Tensor, ...]:
    """Returns the tensors of SwiGLU networks whose gate and up projections are one tensor.

    Args:
      theirs: their name, such as `shared_mlp`.
      ours: their path, such as `ffn/shared`.
      experts: the first axis, if there are several of them.
    """
    return (
        Tensor(
            f"{theirs}.input_linear.weight",
            f"{experts} (P F) D".strip(),
            f"{ours}/gate_up",
            f"{experts} D P F".strip(),
        ),
        Tensor(
            f"{theirs}.output_linear.weight",
            f"{experts} D F".strip(),
            f"{ours}/down",
            f"{experts} F D".strip(),
        ),
    )


MOE = (
    Tensor("block_sparse_moe.router.layer.weight", "E D", "ffn/router/kernel", "D E"),
    *fused_feed_forward("block_sparse_moe", "ffn/experts", "E"),
)
