"""docs/specialisation.md against the results it cites."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
