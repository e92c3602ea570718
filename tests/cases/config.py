"""What the tests of the configuration set leaves to."""

import typing

import pytest

from moejax.config import LOSS_SPECS, ConfigError, declared, resolve

TWO_PAIRS = {"attention.head_dim": 4}

SPECIMENS = {
    "moe.router": ("switch", {"moe.top_k": 1, "moe.renormalize": False}),
    "moe.first_dense": (1, {}),
    "moe.every": (2, {}),
    "attention.num_heads": (8, {}),
    "attention.clip_qkv": (2.0, {}),
    "attention.d_query_latent": (48, {"attention.kind": "latent"}),
    "attention.d_kv_latent": (48, {"attention.kind": "latent"}),
    "attention.d_nope": (48, {"attention.kind": "latent", "attention.d_value": 64}),
    "attention.d_rope": (32, {"attention.kind": "latent"}),
    "attention.d_value": (64, {"attention.kind": "latent"}),
    "attention.score_factor": (1.5, {}),
    "attention.num_query_experts": (16, {"attention.kind": "routed"}),
    "attention.top_k_query_experts": (4, {"attention.kind": "routed", "attention.num_heads": 8}),
    "attention.router_loss_factor": (2.0, {"attention.kind": "routed"}),
    "attention.scale_latents": (True, {"attention.kind": "latent"}),
    "attention.latent_bias": (True, {"attention.kind": "latent"}),
    "attention.window": (64, {}),
    "attention.window_layers": ("window, full", {"attention.window": 64}),
    "attention.chunk": (64, {}),
    "attention.chunk_layers": ("chunk, full", {"attention.chunk": 64}),
    "attention.score_cap": (30.0, {}),
    "attention.temperature": (0.1, {"attention.rope_layers": "rope, none"}),
    "attention.temperature_length": (
        64,
        {"attention.rope_layers": "rope, none", "attention.temperature": 0.1},
    ),
    "attention.qk_norm_after_rope": (True, {"attention.qk_norm": "head"}),
    "attention.qk_norm_layers": (
        "rope",
        {"attention.qk_norm": "unweighted", "attention.rope_layers": "rope, none"},
    ),
    "attention.rope_layers": ("rope, rope, none", {}),
    "attention.rope_dim": (32, {}),
    "attention.rope_theta_window": (500.0, {"attention.window": 64}),
    "attention.rope_factor": (8.0, {"attention.rope_scaling": "yarn"}),
    "attention.rope_original_length": (512, {"attention.rope_scaling": "yarn"}),
    "attention.rope_beta_fast": (16.0, {"attention.rope_scaling": "yarn"}),
    "attention.rope_beta_slow": (2.0, {"attention.rope_scaling": "yarn"}),
    "attention.rope_truncate": (False, {"attention.rope_scaling": "yarn"}),
    "attention.rope_wavelengths": ("1.5, 2", {"attention.rope_scaling": "longrope"} | TWO_PAIRS),
    "attention.rope_long_magnitude": (
        1.5,
        {"attention.rope_scaling": "longrope", "attention.rope_wavelengths": "1, 2"} | TWO_PAIRS,
    ),
    "attention.rope_magnitude": (1.5, {"attention.rope_scaling": "yarn"}),
    "model.embedding_multiplier": (1.0, {}),
    "model.logits_cap": (30.0, {}),
    "model.final_norm_epsilon": (1e-3, {}),
    "moe.d_shared": (24, {"moe.num_shared_experts": 1}),
    "moe.renormalize_floor": (0.5, {}),
    "moe.top_k": (4, {}),
    "attention.num_kv_heads": (4, {}),
    "train.accumulation": (2, {}),
    "train.step_limit_s": (60.0, {}),
    "alarms.stop": ("ties, drops", {}),
    "data.source": ("synthetic", {}),
    "data.tokenizer": ("bytes", {}),
    "data.text_field": ("body", {"data.source": "files", "data.files": "texts"}),
    "moe.score": ("softmax_after", {}),
    "moe.weight_norm": (2.0, {}),
    "moe.jitter": (0.01, {}),
    "moe.num_groups": (4, {"moe.top_k_groups": 2}),
    "moe.top_k_groups": (2, {"moe.num_groups": 4}),
    "moe.eval_capacity_factor": (2.0, {"moe.dispatch": "capacity"}),
    "moe.router_noise": ("fixed", {"moe.router": "noisy_topk"}),
    "moe.shared_bias": (True, {"moe.num_shared_experts": 1}),
    "model.ffn_bias": (True, {"moe.first_dense": 1, "moe.d_expert": 64}),
    "moe.shared_combine": ("gated", {"moe.num_shared_experts": 1}),
    "moe.expert_dropout": (0.1, {}),
    "moe.per_layer": ("0: top_k=1 renormalize=False", {}),
    "schedule.capacity_factor": ("linear:0.5", {"moe.dispatch": "capacity"}),
    "schedule.top_k": ("step:0.5:0.5", {"moe.top_k": 4}),
    "schedule.jitter": ("cosine:0.5", {"moe.jitter": 0.1}),
    "schedule.noise_scale": ("exponential:0.1", {"moe.router": "noisy_topk"}),
    "schedule.bias_rate": ("step:0.8:0", {"moe.selection_bias": True}),
    "schedule.expert_dropout": ("warmup:0.5", {"moe.expert_dropout": 0.1}),
    "moe.activation_limit": (3.5, {"moe.activation": "clamped_swiglu"}),
    "moe.select_by": ("logits", {"moe.selection_bias": True}),
    "moe.noise_scale": (0.5, {"moe.router": "noisy_topk"}),
    "moe.group_score": ("max", {"moe.num_groups": 4, "moe.top_k_groups": 2}),
    "moe.mixer_threshold": (0.1, {"moe.router": "sparse_mixer"}),
    "moe.sinkhorn_iterations": (16, {"moe.router": "sinkhorn", "moe.allow_noncausal": True}),
    "moe.d_router": (16, {"moe.router": "cosine"}),
    "moe.slots_per_expert": (16, {"moe.router": "soft", "moe.allow_noncausal": True}),
    "moe.capacity_factor": (2.0, {"moe.dispatch": "capacity"}),
    "moe.capacity_group": ("global", {"moe.dispatch": "capacity"}),
    "moe.capacity_order": ("weight", {"moe.dispatch": "capacity", "moe.allow_noncausal": True}),
    "moe.overflow": ("next", {"moe.dispatch": "capacity"}),
    "moe.bias_rate": (5e-4, {"moe.selection_bias": True}),
    "moe.bias_centered": (True, {"moe.selection_bias": True}),
    "data.name": ("set", {"data.source": "tfds", "data.source_dir": "folder"}),
    "data.source_dir": ("folder", {"data.source": "tfds", "data.name": "set"}),
    "data.files": ("texts/*.txt", {"data.source": "files"}),
    "optimizer.decay_fraction": (0.1, {"optimizer.schedule": "wsd"}),
    "optimizer.muon_momentum": (0.9, {"optimizer.name": "muon"}),
    "optimizer.adam_rate": (0.5, {"optimizer.name": "muonh"}),
    "train.logit_z_weight": (1e-4, {}),
    "train.average_decay": (0.99, {}),
    "mup.base_width": (64, {}),
    "mup.base_d_ff": (256, {"mup.base_width": 64}),
    "mup.base_d_expert": (256, {"mup.base_width": 64}),
    "mup.base_depth": (2, {"mup.base_width": 64}),
    "mup.base_top_k": (2, {"mup.base_width": 64}),
    "optimizer.frozen": ("router, */mixer/*", {}),
    "init.state": ("optimizer", {"init.source": "runs/a"}),
    "init.include": ("experts, stacks/0/*", {"init.source": "runs/a"}),
    "init.exclude": ("router", {"init.source": "runs/a"}),
    "init.rename": ("stacks/0/=stacks/1/", {"init.source": "runs/a"}),
    "init.upcycle": ("drop", {"init.source": "runs/a"}),
    "init.upcycle_noise": (0.01, {"init.source": "runs/a", "init.upcycle": "copy"}),
    "init.upcycle_drop": (0.25, {"init.source": "runs/a", "init.upcycle": "drop"}),
    "init.resize": ("copy", {"init.source": "runs/a"}),
    "optimizer.groups": ("router: rate=0.3; */mixer/*: weight_decay=0", {}),
}
"""Values of leaves whose type does not suggest one, and what must change with them."""


def with_loss(name, weight=0.1):
    """Returns leaves of `moe` that give a loss a weight, with a router that it fits."""
    routers = LOSS_SPECS[name].fitting_routers
    default = declared()["moe.router"].default
    router = {} if default in routers else {"router": routers[0]}
    return {f"{name}_weight": weight} | router


def _specimens_of_losses():
    for name in LOSS_SPECS:
        leaves = {f"moe.{leaf}": value for leaf, value in with_loss(name).items()}
        yield f"schedule.{name}_weight", ("linear:2", leaves)
        weight = f"moe.{name}_weight"
        others = {key: value for key, value in leaves.items() if key != weight}
        yield weight, (leaves[weight], others)


SPECIMENS |= dict(_specimens_of_losses())


def nested(changes):
    """Returns dotted keys as nested dicts."""
    sections = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def refusal(changes):
    """Returns the one-line message with which `changes` are refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(nested(changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def other_value(key):
    """Returns a value of the leaf that is not its default, and what must change with it."""
    each = declared()[key]
    if key in SPECIMENS:
        return SPECIMENS[key]
    if choices := typing.get_args(each.annotation):
        return choices[-1 if each.default != choices[-1] else 0], {}
    by_type = {
        bool: lambda: not each.default,
        int: lambda: each.default + 8,
        float: lambda: each.default * 0.5,
        str: lambda: each.default + "x",
    }
    return by_type[each.annotation](), {}
