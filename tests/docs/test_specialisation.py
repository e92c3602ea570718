"""docs/specialisation.md against the results it cites."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from moejax.sweeps.arms import plan_arms

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/specialisation.md").read_text()


@pytest.fixture(scope="module")
def experiment():
    return runpy.run_path(str(ROOT / "experiments/specialisation/analysis.py"))


@pytest.fixture(scope="module")
def results(experiment):
    return json.loads(experiment["RESULTS"].read_text())


def test_the_tables_are_those_of_the_results(experiment, results):
    start, end = experiment["MARKS"]
    assert PAGE.split(start)[1].split(end)[0] == experiment["tables"](results)


def test_the_results_are_those_of_the_sweep(results):
    sweep = runpy.run_path(str(ROOT / "experiments/specialisation/sweep.py"))
    assert list(results) == list(sweep["CONDITIONS"])
    plan = plan_arms(sweep["get_config"]().to_dict(), sweep["sweep"]())
    seeds = [seed for by_seed in results.values() for seed in by_seed]
    assert [str(arm.config.train.seed) for arm in plan.arms] == seeds
    for arm in plan.arms:
        is_untrained = arm.config.train.num_steps == 1
        is_dense = arm.config.moe.num_experts == 0
        name = "untrained" if is_untrained else "dense" if is_dense else "moe"
        assert str(arm.config.train.seed) in results[name]


def test_the_answer_agrees_with_the_results(experiment, results):
    by_seed = experiment["by_seed"]

    def excess(*question):
        return by_seed(results, "moe", question, "excess").mean(axis=0)

    token_N = excess("token", "domain", "tokens")
    domain_N = excess("domain", "token", "tokens")
    over_documents_N = excess("domain", "token", "documents")
    text = " ".join(PAGE.split())
    assert f"falls from {token_N[0]:.2f} to {token_N[-1]:.2f} bits" in PAGE
    rise = f"rises from {domain_N[0]:.2f} to {domain_N[-1]:.2f}"
    assert f"{rise}: a factor of {token_N[0] / domain_N[0]:.0f} at" in text
    assert f"and of {token_N[-1] / domain_N[-1]:.0f} at the top" in PAGE
    assert (np.diff(token_N) < 0).all() and (np.diff(domain_N) > 0).all()
    assert (over_documents_N > 0).all()
    for given in ("", "token"):
        question = ("domain", given, "documents")
        excess_SN = by_seed(results, "moe", question, "excess")
        spread_SN = by_seed(results, "moe", question, "spread")
        assert (excess_SN / spread_SN).min() > 19
    for found in results["moe"].values():
        japanese = found["domains"]["names"].index("japanese")
        share_DE = np.array(found["domains"]["share_over_uniform"])[-1]
        assert share_DE[japanese].max() > 7.89
        assert np.delete(share_DE, japanese, axis=0).max() < 5
    question = ("token", "", "tokens")
    before = by_seed(results, "untrained", question, "adjusted").mean()
    after = by_seed(results, "moe", question, "adjusted").mean()
    assert f"({before:.2f} against {after:.2f} of what could" in PAGE
