"""The id of a configuration: the same in every version of moejax that computes the same from it.

An id hashes all leaves that there were when sweeps first had ids, and of later leaves those that
differ from their default. So a new leaf, whose default must mean what was done before, gives no arm
of an earlier sweep another id.
"""

import hashlib
import json
from typing import Any

from moejax.config import Config, declared

ID_DIGITS = 10
"""Of the hash: among 10,000 arms two share an id with a probability of 1 in 22,000."""

LEFT_OUT = ("data.directory", "train.check_memory")
"""Leaves that do not change what is computed.

Some others that do not change it either were in ids from the beginning.
"""

FIRST_LEAVES = {
    "model": """
        num_layers d_model num_heads num_kv_heads d_ff qk_norm tied_embeddings rope_theta
        compute_dtype remat scan_layers
    """,
    "moe": """
        num_experts top_k d_expert num_shared_experts shared_combine activation activation_limit
        expert_bias d_latent weight_on expert_dropout num_zero_experts num_identity_experts
        num_constant_experts first_dense every per_layer router score select_by renormalize
        route_scale router_bias jitter router_noise noise_scale num_groups top_k_groups group_score
        mixer_threshold sinkhorn_iterations d_router slots_per_expert allow_noncausal dispatch
        capacity_factor eval_capacity_factor capacity_group capacity_order overflow exchange
        exchange_buffer exchange_chunks save_exchanged grouped_matmul balance_weight balance_scope
        balance_convention sequence_balance_weight importance_weight vmoe_importance_weight
        load_weight vmoe_load_weight z_weight selection_bias bias_rate bias_centered
    """,
    "data": """
        source name source_dir files tokenizer vocab_size seq_len
    """,
    "train": """
        num_steps batch_size accumulation seed log_every eval_every checkpoint_every
        keep_checkpoints max_nonfinite_steps step_limit_s
    """,
    "optimizer": """
        learning_rate schedule warmup_fraction decay_fraction final_fraction beta1 beta2
        weight_decay clip_norm
    """,
    "schedule": """
        capacity_factor top_k jitter noise_scale bias_rate expert_dropout balance_weight
        sequence_balance_weight importance_weight vmoe_importance_weight load_weight
        vmoe_load_weight z_weight
    """,
    "alarms": """
        collapse dead_experts balance_floor logits ties drops entropy stop
    """,
    "mesh": """
        data fsdp expert context tensor dcn_data dcn_fsdp dcn_expert
    """,
}
"""The leaves of the first ids, by section. Nothing is added here, and nothing removed."""


def hash_config(config: Config) -> str:
    """Returns the SHA-256 of a resolved configuration as JSON with sorted keys, in hexadecimal."""
    values: dict[str, dict[str, Any]] = {section: {} for section in FIRST_LEAVES}
    for key, leaf in declared().items():
        if key in LEFT_OUT:
            continue
        value = leaf.value(config)
        first_names = FIRST_LEAVES.get(leaf.section, "").split()
        if leaf.name in first_names or value != leaf.default:
            section = values.setdefault(leaf.section, {})
            section[leaf.name] = value
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
