"""Any configuration gives on eight devices what it gives on one."""

import os
import subprocess
import sys

import numpy as np

from soak.field import LONGEST_S, REPOSITORY, Field

MESHES = (
    {"data": 8},
    {"fsdp": 4, "data": 2},
    {"expert": 4, "data": 2},
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"dcn_expert": 2, "expert": 2, "data": 2},
    {"context": 2, "expert": 2, "data": 2},
)
EXCHANGES = ("auto", "gather", "ring", "all_to_all", "ragged", "dedup")
MOE_CHANGES = (
    {},
    {"num_shared_experts": 1},
    {"activation": "geglu"},
    {"expert_bias": True},
    {"exchange_chunks": 2},
    {"exchange_buffer": 0.6},
    {"balance_scope": "sequence"},
)
MODEL_CHANGES = (
    {},
    {"remat": False},
    {"scan_layers": False},
    {"tied_embeddings": False},
)
ATTENTION_CHANGES = (
    {},
    {"qk_norm": "head"},
    {"qk_norm": "whole", "clip_qkv": 2.0},
    {"qkv_bias": True, "out_bias": True},
    {"head_dim": 12},
)


def trial(field: Field, seed: int) -> str:
    """Compares in another process, which has eight devices; returns what was wrong."""
    environment = field.environment(num_devices=8)
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, "-m", "soak.configurations", str(seed)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr[-600:]}"
    return done.stdout.strip()


def compare(seed: int) -> str:
    """Draws a configuration, and compares its losses, gradients and sums on a mesh and alone."""
    from cases.training import OTHER_CASES, ROUTER_CASES, case_config
    from moejax.config import ConfigError
    from training.test_invariance import assert_same, run

    rng = np.random.default_rng(seed)
    case = _one_of(rng, [*ROUTER_CASES, *OTHER_CASES])
    moe = _one_of(rng, MOE_CHANGES)
    decoder = {
        "model": _one_of(rng, MODEL_CHANGES),
        "attention": _one_of(rng, ATTENTION_CHANGES),
    }
    mesh = {"data": 1} | _one_of(rng, MESHES)
    train = {"accumulation": _one_of(rng, (1, 2)), "batch_size": 16}
    exchange = {"exchange": _one_of(rng, EXCHANGES)}
    try:
        here = case_config(case, moe=moe, **decoder, train={"batch_size": 16}, mesh={"data": 1})
        there = case_config(case, moe=moe | exchange, **decoder, train=train, mesh=mesh)
        expected = run(here)
        actual = run(there, 8)
    except ConfigError:
        return ""  # refused before anything is traced
    try:
        assert_same(actual, expected)
    except AssertionError as error:
        message = " ".join(str(error).split())[:600]
        return f"{case} {mesh} {moe} {decoder} {train} {exchange}: {message}"
    return ""


def _one_of(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


if __name__ == "__main__":
    print(compare(int(sys.argv[1])))
