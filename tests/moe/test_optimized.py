"""Comparisons with the oracles, and of ways to compute a step, in programs as users run them.

They have all of XLA's optimisations, and most of them are left out by all other tests, to compile
faster: rounding, fusions and the order of sums differ.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parents[1]
CHOSEN = {
    "moe/router/test_oracle.py": None,
    "moe/test_layer.py": None,
    "moe/test_precision.py": None,
    "moe/dispatch/test_overflow_weights.py": None,
    "moe/expert_parallel/test_exchange.py": [
        "any_two_factors_together_leave_the_outputs_and_gradients_of_the_loop"
    ],
    "training/test_invariance.py": None,
}
"""Tests by file; None is all of them."""


def names_of(chosen):
    """Returns the arguments by which pytest finds these tests."""
    found = []
    for file, names in chosen.items():
        path = str(TESTS / file)
        found += [path] if names is None else [f"{path}::test_{name}" for name in names]
    return found


@pytest.mark.skipif(
    "MOEJAX_TESTS_OPTIMIZED" not in os.environ, reason="for the process that the next test starts"
)
def test_this_process_compiles_as_users_do():
    assert not jax.config.values["jax_disable_most_optimizations"]
    flags = os.environ.get("XLA_FLAGS", "")
    assert "fusion_emitters" not in flags and "split_count" not in flags


@pytest.mark.skipif("MOEJAX_TESTS_OPTIMIZED" in os.environ, reason="this is that process")
@pytest.mark.slow
def test_the_oracles_agree_with_programs_as_users_run_them():
    environment = os.environ | {"MOEJAX_TESTS_OPTIMIZED": "1"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    environment.pop("PYTEST_ADDOPTS", None)
    ours = r"--xla_cpu_(use_fusion_emitters|parallel_codegen_split_count)=\S+"
    flags = re.sub(ours, "", environment.pop("XLA_FLAGS", "")).strip()
    if flags:  # XLA takes a blank for the name of a file, and exits without a word
        environment["XLA_FLAGS"] = flags
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=8"]
    done = subprocess.run(
        [*command, f"{__file__}::test_this_process_compiles_as_users_do", *names_of(CHOSEN)],
        env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
