"""Comparisons with the oracles in programs as users run them, with all of XLA's optimisations.

All other tests leave most of them out, to compile faster; rounding, fusions and the order of sums differ.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
LAYER, INVARIANCE = "test_moe_layer.py::test_", "test_training_invariance.py::test_"
CHOSEN = [
    # Routers, values alone; layers with their gradients, on one device and on eight.
    "test_moe_routers_oracle.py",
    LAYER + "the_dropless_layer_and_all_its_gradients_equal_the_oracle",
    LAYER + "the_capacity_layer_and_all_its_gradients_equal_the_oracle_also_when_it_drops",
    LAYER + "the_layer_equals_the_oracle_with_every_other_grouped_product",
    LAYER + "experts_without_tokens_get_exactly_zero_gradient_and_full_ones_the_right_one",
    LAYER + "on_a_mesh_outputs_counts_and_gradients_are_those_of_the_oracle",
    # Train steps on one device and on eight, and how tokens meet experts there.
    INVARIANCE + "the_reference_step_is_not_trivial",
    INVARIANCE + "how_tokens_meet_experts_changes_nothing[two_level]",
    # What the survivors of an overflow weigh, and that outputs in bfloat16 are rounded once.
    "test_moe_overflow_weights.py",
    "test_moe_precision.py",
]


@pytest.mark.skipif("MOEJAX_TESTS_OPTIMIZED" not in os.environ, reason="for the process that the next test starts")
def test_this_process_compiles_as_users_do():
    assert not jax.config.jax_disable_most_optimizations
    assert "fusion_emitters" not in os.environ.get("XLA_FLAGS", "")


@pytest.mark.skipif("MOEJAX_TESTS_OPTIMIZED" in os.environ, reason="this is that process")
def test_the_oracles_agree_with_programs_as_users_run_them():
    flags = re.sub(r"--xla_cpu_use_fusion_emitters=\S+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"MOEJAX_TESTS_OPTIMIZED": "1", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=12"]
    done = subprocess.run(
        [*command, f"{__file__}::test_this_process_compiles_as_users_do", *(str(TESTS / name) for name in CHOSEN)],
        env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d{3} passed in", done.stdout, re.MULTILINE), done.stdout[-2000:]
