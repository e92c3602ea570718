"""docs/specialisation.md against the results it cites."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/specialisation.md").read_text()


@pytest.fixture(scope="module")
def experiment():
    return runpy.run_path(str(ROOT / "experiments/specialisation/run.py"))


@pytest.fixture(scope="module")
def results(experiment):
    return json.loads(experiment["RESULTS"].read_text())


def test_the_tables_are_those_of_the_results(experiment, results):
    start, end = experiment["MARKS"]
    assert PAGE.split(start)[1].split(end)[0] == experiment["tables"](results)
    assert {name: tuple(map(int, by_seed)) for name, by_seed in results.items()} == {
        name: tuple(seeds) for name, (seeds, _) in experiment["CONDITIONS"].items()
    }


def test_the_answer_says_what_the_results_say(experiment, results):
    by_seed = experiment["by_seed"]
    token, domain, over_documents = (
        by_seed(results, "moe", question, "excess").mean(axis=0)
        for question in (
            ("token", "domain", "tokens"),
            ("domain", "token", "tokens"),
            ("domain", "token", "documents"),
        )
    )
    assert f"falls from {token[0]:.2f} to {token[-1]:.2f} bits" in PAGE
    assert (
        f"rises from {domain[0]:.2f} to {domain[-1]:.2f}: a factor of {token[0] / domain[0]:.0f} at"
        in " ".join(PAGE.split())
    )
    assert f"and of {token[-1] / domain[-1]:.0f} at the top" in PAGE
    assert (np.diff(token) < 0).all() and (np.diff(domain) > 0).all() and (over_documents > 0).all()
    for given in ("", "token"):
        question = ("domain", given, "documents")
        scores = by_seed(results, "moe", question, "excess") / by_seed(
            results, "moe", question, "spread"
        )
        assert scores.min() > 19
    for found in results["moe"].values():
        names, share_NDE = (
            found["domains"]["names"],
            np.array(found["domains"]["share_over_uniform"]),
        )
        assert share_NDE[-1, names.index("japanese")].max() > 7.89
        assert np.delete(share_NDE[-1], names.index("japanese"), axis=0).max() < 5
    before, after = (
        by_seed(results, c, ("token", "", "tokens"), "adjusted").mean()
        for c in ("untrained", "moe")
    )
    assert f"({before:.2f} against {after:.2f} of what could" in PAGE
