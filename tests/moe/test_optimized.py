"""Comparisons with the oracles in programs as users run them, with all of XLA's optimisations.

All other tests leave most of them out, to compile faster; rounding, fusions and the order of
sums differ.
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
    "moe/router/test_oracle.py": [
        "hierarchical_routing_is_a_product_of_two_gates",
        "noisy_top_k_selects_and_weighs_by_noisy_logits_in_training_and_by_clean_ones_in_evaluation",
        "scores_that_vanish_or_saturate_still_make_probabilities_and_weights_that_sum_to_one",
        "a_quantile_step_is_the_one_of_the_loop_and_balances_what_it_has_seen",
    ],
    # Layers with all gradients, on one device and on eight.
    "moe/test_layer.py": [
        "the_dropless_layer_and_all_its_gradients_equal_the_oracle",
        "the_capacity_layer_and_all_its_gradients_equal_the_oracle_also_when_it_drops[0.6-softmax_topk-2-True]",
        "the_layer_equals_the_oracle_with_every_other_grouped_product",
        "on_a_mesh_outputs_counts_and_gradients_are_those_of_the_oracle",
    ],
    # Two train steps on one device, and the sums and gradients of one on eight.
    "training/test_invariance.py": [
        "the_reference_step_is_not_trivial",
        "how_tokens_meet_experts_changes_nothing[two_level]",
    ],
    # Outputs in bfloat16 are rounded once; survivors' weights.
    "moe/test_precision.py": [
        "weighted_sums_of_bfloat16_outputs_are_rounded_once",
        "weights_travel_as_float32",
    ],
    "moe/dispatch/test_overflow_weights.py": [
        "a_layer_whose_first_choice_overflows_has_the_survivors_output_and_gradient"
    ],
}


@pytest.mark.skipif(
    "MOEJAX_TESTS_OPTIMIZED" not in os.environ, reason="for the process that the next test starts"
)
def test_this_process_compiles_as_users_do():
    assert not jax.config.values["jax_disable_most_optimizations"]
    assert "fusion_emitters" not in os.environ.get("XLA_FLAGS", "")


@pytest.mark.skipif("MOEJAX_TESTS_OPTIMIZED" in os.environ, reason="this is that process")
def test_the_oracles_agree_with_programs_as_users_run_them():
    environment = os.environ | {"MOEJAX_TESTS_OPTIMIZED": "1"}
    flags = re.sub(
        r"--xla_cpu_use_fusion_emitters=\S+", "", environment.pop("XLA_FLAGS", "")
    ).strip()
    if flags:  # XLA takes a blank for the name of a file, and exits without a word
        environment["XLA_FLAGS"] = flags
    chosen = [f"{TESTS / file}::test_{name}" for file, names in CHOSEN.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=8"]
    done = subprocess.run(
        [*command, f"{__file__}::test_this_process_compiles_as_users_do", *chosen],
        env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
