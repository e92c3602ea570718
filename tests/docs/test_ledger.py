"""The ledger is what the experiments' claims and results say."""

import json
import runpy
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MODULE = runpy.run_path(str(EXPERIMENTS / "ledger.py"))


def test_the_page_is_what_claims_and_results_give():
    assert (EXPERIMENTS / "ledger.md").read_text() == MODULE["ledger"]()


def test_every_experiment_with_a_prediction_has_claims_with_verdicts():
    asking = {
        path.parent.name
        for path in EXPERIMENTS.glob("*/README.md")
        if "rediction" in path.read_text() or "Predicted" in path.read_text()
    }
    claimed = {path.parent.name for path in EXPERIMENTS.glob("*/claims.json")}
    assert asking == claimed
    for path in EXPERIMENTS.glob("*/claims.json"):
        for claim in json.loads(path.read_text()):
            assert set(claim) == {"predicted", "verdict", "measured"}, path
            assert claim["verdict"] in MODULE["VERDICTS"]


def test_places_take_keys_all_values_and_rows_and_nothing_that_is_absent():
    fill = MODULE["fill"]
    results = {"a": {"0": {"x/y": 1.0}, "1": {"x/y": 2.0}}, "rows": [1]}
    assert fill("{a.*.x/y:.2f} of {a.1.x/y:.0f}", results) == "1.50 of 2"
    rows = [{"k": 8, "loss": 3.0}, {"k": 32, "loss": 5.0}, {"k": 8, "loss": 4.0}]
    assert fill("{[k=8].loss:.1f} and {[k=32].loss:.0f}", rows) == "3.5 and 5"
    assert MODULE["take"](rows, ["[k=8]", "loss"]) == [3.0, 4.0]
    with pytest.raises(KeyError):
        MODULE["take"](rows, ["[k=9]", "loss"])
    with pytest.raises(KeyError):
        fill("{a.2.x/y:.1f}", results)
