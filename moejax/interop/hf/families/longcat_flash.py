"""LongCat-Flash (Meituan 2025): two dense blocks a layer, and experts beside them."""

import re
from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import Always, Fixed, Ignored, Key, first_of, without
from moejax.interop.hf.llama import BASE, MLP_EXPERTS, OUTER, feed_forward
from moejax.interop.hf.rope import ROPE_SCALING
from moejax.interop.hf.shared.latent_attention import EQUAL_HEADS, SCORE_FACTOR
from moejax.interop.hf.tensors import Tensor

EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def _says_nothing(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor has no part in what the reference computes.

    Such are layers that predict further tokens, a bias of the router, which it reads and never
    adds, and weights that it writes for experts that have none.
    """
    if name.startswith("model.mtp.") or name.endswith(".mlp.router.classifier.bias"):
        return True
    expert = EXPERT.search(name)
    return expert is not None and int(expert[1]) >= first_of(published, ("n_routed_experts",))


def _block(number: int) -> tuple[Tensor, ...]:
    """Returns the tensors of one of the two dense blocks of a layer."""
    theirs, ours = f"self_attn.{number}", "first" if number == 0 else "second"
    mixer = f"{ours}/mixer"
    return (
        Tensor(f"input_layernorm.{number}.weight", "D", f"{ours}/mixer_norm/scale", "D"),
        Tensor(f"post_attention_layernorm.{number}.weight", "D", f"{ours}/ffn_norm/scale", "D"),
        Tensor(f"{theirs}.q_a_proj.weight", "C D", f"{mixer}/query_down", "D C"),
        Tensor(f"{theirs}.q_a_layernorm.weight", "C", f"{mixer}/query_norm/scale", "C"),
        Tensor(f"{theirs}.q_b_proj.weight", "(H A) C", f"{mixer}/query", "C H A"),
        Tensor(f"{theirs}.kv_a_proj_with_mqa.weight", "X D", f"{mixer}/kv_down", "D X"),
        Tensor(f"{theirs}.kv_a_layernorm.weight", "C", f"{mixer}/kv_norm/scale", "C"),
        Tensor(f"{theirs}.kv_b_proj.weight", "(H X) C", f"{mixer}/kv_up", "C H X"),
        Tensor(f"{theirs}.o_proj.weight", "D (H A)", f"{mixer}/out", "H A D"),
        *feed_forward(f"mlps.{number}", f"{ours}/ffn"),
    )


FAMILY = Family(
    model_type="longcat_flash",
    architecture="LongcatFlashForCausalLM",
    keys=(
        *without(BASE, "num_hidden_layers"),
        EQUAL_HEADS,
        ROPE_SCALING,
        SCORE_FACTOR,
        Key("num_layers", "model.num_layers"),
        Key("ffn_hidden_size", "model.d_ff", aliases=("intermediate_size",)),
        Key("rope_theta", "attention.rope_theta", default=1e7),
        Key("q_lora_rank", "attention.d_query_latent"),
        Key("kv_lora_rank", "attention.d_kv_latent"),
        Key("qk_nope_head_dim", "attention.d_nope"),
        Key("qk_rope_head_dim", "attention.d_rope"),
        Key("v_head_dim", "attention.d_value"),
        Key("n_routed_experts", "moe.num_experts", aliases=("num_local_experts",)),
        Key("zero_expert_num", "moe.num_identity_experts", default=0),
        Key("moe_topk", "moe.top_k", aliases=("num_experts_per_tok",)),
        Key("expert_ffn_hidden_size", "moe.d_expert", aliases=("moe_intermediate_size",)),
        Key("routed_scaling_factor", "moe.route_scale", default=6.0),
        Fixed("attention_bias", False),
        Fixed("attention_method", "MLA"),
        Fixed("zero_expert_type", "identity"),
        # The reference scales both, whatever these say.
        Fixed("mla_scale_q_lora", True),
        Fixed("mla_scale_kv_lora", True),
        Ignored("head_dim", "num_hidden_layers", "qk_head_dim", "router_bias"),
        Always("model.shortcut", True),
        Always("attention.kind", "latent"),
        Always("attention.scale_latents", True),
        Always("attention.rope_interleaved", True),
        Always("moe.router", "softmax_topk"),
        Always("moe.score", "softmax"),
        Always("moe.renormalize", False),
        Always("moe.selection_bias", True),
        Always("moe.balance_weight", 0.0),
        Always("moe.z_weight", 0.0),
    ),
    outer=OUTER,
    layer=(*_block(0), *_block(1)),
    dense=(),
    moe=(
        Tensor("mlp.router.classifier.weight", "E D", "ffn/router/kernel", "D E"),
        Tensor("mlp.router.e_score_correction_bias", "E", "ffn/selection_bias", "E"),
        *MLP_EXPERTS,
    ),
    is_ignored=_says_nothing,
)
