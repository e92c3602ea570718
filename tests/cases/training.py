"""Small configurations and batches that the training tests share."""

import dataclasses
import functools
from collections.abc import Container, Iterable
from typing import Any

import jax
import numpy as np
import pytest

from moejax.config import Config, resolve
from moejax.data import Batch
from moejax.sharding import make_mesh
from moejax.training import loop
from moejax.training.program import Program
from moejax.training.state import TrainSetup, TrainState, make_train_setup

SMALL: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "d_model": 32, "d_ff": 32},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "moe": {"num_experts": 4, "top_k": 2, "d_expert": 16, "balance_weight": 0.1, "z_weight": 0.01},
    "data": {"tokenizer": "bytes", "seq_len": 16, "source": "synthetic"},
    "train": {"batch_size": 8, "num_steps": 4},
    "mesh": {"data": -1},
}

ROUTER_CASES: dict[str, dict[str, Any]] = {  # by router, with what makes its parts matter
    "softmax_topk": {
        "score": "softmax_after",
        "num_groups": 2,
        "group_score": "max",
        "selection_bias": True,
    },
    "switch": {
        "top_k": 1,
        "renormalize": False,
        "jitter": 0.1,
        "dispatch": "capacity",
        "capacity_factor": 1.0,
    },
    "noisy_topk": {
        "importance_weight": 0.1,
        "load_weight": 0.1,
        "vmoe_importance_weight": 0.1,
        "vmoe_load_weight": 0.1,
    },
    "sigmoid_topk": {
        "selection_bias": True,
        "bias_centered": True,
        "num_groups": 2,
        "route_scale": 2.5,
        "sequence_balance_weight": 1e-2,
        "balance_scope": "sequence",
        "router_bias": True,
    },
    "cosine": {
        "balance_convention": "first_choice",
        "dispatch": "capacity",
        "capacity_factor": 0.8,
        "overflow": "next",
    },
    "sparse_mixer": {"mixer_threshold": 0.1, "balance_convention": "times_k"},
    "sinkhorn": {
        "allow_noncausal": True,
        "dispatch": "capacity",
        "capacity_factor": 0.8,
        "capacity_order": "weight",
    },
    "quantile": {
        "score": "sigmoid",
        "dispatch": "capacity",
        "capacity_factor": 0.8,
        "overflow": "renormalize",
    },
    "hierarchical": {
        "num_experts": 8,
        "num_groups": 4,
        "top_k_groups": 2,
        "top_k": 4,
        "balance_convention": "over_k",
    },
    "hash": {"score": "sqrt_softplus"},
    "random": {},
    "balanced": {},
    "expert_choice": {"allow_noncausal": True},
    "soft": {"allow_noncausal": True},
    "dense": {"top_k": 4},
}


OTHER_CASES: dict[str, dict[str, dict[str, Any]]] = {  # sections; by what they try
    "experts": {
        "moe": {
            "activation": "clamped_swiglu",
            "activation_limit": 0.5,
            "expert_bias": True,
            "output_bias": True,
            "expert_dropout": 0.3,
            "d_latent": 16,
            "num_shared_experts": 1,
            "shared_combine": "gated",
            "num_zero_experts": 1,
            "num_identity_experts": 1,
            "num_constant_experts": 2,
            "selection_bias": True,
        },
    },
    "weights on the input": {
        "moe": {
            "router": "sigmoid_topk",
            "weight_on": "input",
            "top_k": 1,
            "renormalize": False,
            "expert_dropout": 0.3,
            "num_shared_experts": 1,
            "shared_combine": "averaged",
            "activation": "squared_relu",
        },
    },
    "layers that differ": {
        "moe": {"per_layer": "0: router=hash; 1: dense; 2: top_k=1 renormalize=False"},
        "model": {"num_layers": 3},
    },
    "attention": {
        "moe": {"first_dense": 1, "every": 2},
        "model": {"num_layers": 5, "norm_epsilon": 1e-4, "embedding_multiplier": 1.0},
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 12,
            "qk_norm": "whole",
            "qkv_bias": True,
            "out_bias": True,
            "clip_qkv": 1.5,
            "window": 3,
            "window_layers": "window, full, full",
            "sinks": True,
            "rope_scaling": "yarn",
            "rope_original_length": 8,
        },
    },
    "positions by layer": {
        "moe": {"first_dense": 1, "every": 2, "num_shared_experts": 1, "shared_bias": True},
        "model": {"num_layers": 5, "ffn_bias": True},
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_norm": "unweighted",
            "qk_norm_after_rope": True,
            "qk_norm_layers": "rope",
            "window": 6,
            "window_layers": "full, window",
            "chunk": 4,
            "chunk_layers": "chunk, full, full",
            "score_cap": 0.7,
            "rope_layers": "rope, rope, none",
            "temperature": 0.4,
            "temperature_length": 3,
            "rope_dim": 6,
            "rope_theta_window": 50.0,
            "rope_scaling": "llama3",
            "rope_beta_fast": 2.0,
            "rope_beta_slow": 0.1,
            "rope_original_length": 8,
        },
    },
    "latent attention": {
        "moe": {"first_dense": 1},
        "model": {"num_layers": 3},
        "attention": {
            "kind": "latent",
            "num_heads": 4,
            "num_kv_heads": 2,
            "d_query_latent": 12,
            "d_kv_latent": 10,
            "d_nope": 6,
            "d_rope": 4,
            "d_value": 8,
            "score_factor": 1.5,
            "rope_interleaved": True,
            "latent_bias": True,
            "out_bias": True,
        },
    },
    "norms after the parts": {
        "moe": {"first_dense": 1},
        "model": {
            "num_layers": 3,
            "norm": "layer",
            "norm_order": "post",
            "residual_multiplier": 0.5,
            "tied_embeddings": False,
            "logits_bias": True,
            "logits_divisor": 0.5,
            "logits_cap": 2.0,
        },
        "attention": {"qk_norm": "head", "score_factor": 0.7},
    },
    "norms on both sides": {
        "model": {"norm": "zero_centered_rms", "norm_order": "sandwich"},
        "attention": {
            "qk_norm": "whole",
            "rope_scaling": "longrope",
            "rope_wavelengths": "1, 1.2, 2, 3.5",
            "rope_original_length": 8,
            "rope_magnitude": 1.1,
            "rope_long_magnitude": 1.3,
        },
    },
    "parallel residual": {
        "moe": {"every": 2},
        "model": {"norm": "layer_without_bias", "parallel_residual": True},
    },
    "shortcut": {
        "model": {"shortcut": True},
        "moe": {
            "num_identity_experts": 2,
            "renormalize": False,
            "route_scale": 2.0,
            "selection_bias": True,
        },
        "attention": {
            "kind": "latent",
            "num_heads": 4,
            "num_kv_heads": 2,
            "d_query_latent": 12,
            "d_kv_latent": 10,
            "d_nope": 6,
            "d_rope": 4,
            "d_value": 8,
            "scale_latents": True,
        },
    },
    "routed attention": {
        "model": {"final_norm_epsilon": 1e-3},
        "moe": {"output_bias": True, "sequence_balance_weight": 0.01},
        "attention": {
            "kind": "routed",
            "num_query_experts": 6,
            "top_k_query_experts": 3,
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 6,
            "out_bias": True,
            "score_factor": 1.3,
            "router_loss_factor": 2.0,
        },
    },
    "schedules": {
        "moe": {"top_k": 4, "renormalize": False, "jitter": 0.1, "selection_bias": True},
        "schedule": {
            "top_k": "linear:0.25",
            "jitter": "linear:0",
            "bias_rate": "cosine:0",
            "z_weight": "warmup:1",
        },
    },
    "capacity of all": {
        "moe": {
            "dispatch": "capacity",
            "capacity_factor": 0.7,
            "capacity_group": "global",
            "capacity_order": "weight",
            "overflow": "next",
            "allow_noncausal": True,
        },
        "train": {"batch_size": 8},
    },
}


LIKE_SIGMOID = {"softmax_topk", "switch", "cosine", "dense"}
"""Routers that are the function of `sigmoid_topk` with other scores."""


def one_for_each_function(routers: Iterable[str], rarely: Container[str] = LIKE_SIGMOID) -> list:
    """Returns cases, of which those of `rarely` are in the long suite only."""
    cases = []
    for router in routers:
        cases.append(pytest.param(router, marks=pytest.mark.slow) if router in rarely else router)
    return cases


def case_config(case: str, **sections: dict[str, Any]) -> Config:
    """A small configuration of a router or of another case; `sections` change it."""
    of_case = OTHER_CASES.get(case) or {"moe": {"router": case} | ROUTER_CASES[case]}
    names = {*of_case, *sections}
    return small_config(**{name: of_case.get(name, {}) | sections.get(name, {}) for name in names})


def small_config(**sections: dict[str, Any]) -> Config:
    """`SMALL` with some leaves changed."""
    return resolve(
        {name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}}
    )


def make(config: Config, num_devices: int = 1) -> TrainSetup:
    """The fixed part of a run on the first devices."""
    return make_train_setup(config, make_mesh(config, jax.devices()[:num_devices]))


def initial_state(setup: TrainSetup) -> TrainState:
    """The state of seed 0, which does not depend on the mesh: compiled once for each model, on one
    device.
    """
    config = setup.config
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=True),
        mesh=resolve({"mesh": {"data": 1}}).mesh,
        train=dataclasses.replace(config.train, accumulation=1),
    )
    return jax.device_put(_initial_arrays(plain), setup.shardings)


@functools.cache
def _initial_arrays(config: Config) -> TrainState:
    return jax.device_get(make(config).init(0))


def packed_batch(config: Config, seed: int = 0) -> Batch:
    """Rows of random tokens with two documents each and padding at the end of some, so that masks
    matter.
    """
    rng = np.random.default_rng(seed)
    batch, length = config.train.batch_size, config.data.seq_len
    tokens_BL = rng.integers(3, 200, (batch, length + 1)).astype(np.int32)
    segments_BL = np.ones((batch, length + 1), np.int32)
    segments_BL[:, length // 3 :] = 2
    for row in range(0, batch, 3):
        segments_BL[row, length - 2 - row :] = 0
    positions_BL = np.where(
        np.arange(length + 1) < length // 3,
        np.arange(length + 1),
        np.arange(length + 1) - length // 3,
    )
    return Batch(
        tokens_BL=tokens_BL[:, :-1],
        targets_BL=tokens_BL[:, 1:],
        segments_BL=segments_BL[:, :-1],
        positions_BL=np.broadcast_to(positions_BL[:-1], (batch, length)).astype(np.int32),
        loss_mask_BL=(segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] > 0),
    )


def replace(config: Config, section: str, **leaves: Any) -> Config:
    """The configuration with some leaves of a section changed."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **leaves)}
    )


def share_programs(patch: pytest.MonkeyPatch, known: dict[str, Any]) -> None:
    """Makes `train` take its programs from `known`, or compile them into it.

    All runs that share them must have one configuration and one mesh.
    """

    def once(name, function):
        def cached(*arguments, **keywords):
            if name not in known:
                known[name] = function(*arguments, **keywords)
            return known[name]

        return cached

    for name in ("compile_step", "make_eval_step"):
        patch.setattr(Program, name, once(name, getattr(Program, name)))
    patch.setattr(loop, "make_train_setup", once("setup", loop.make_train_setup))
