"""The table of docs/families.md is what `experiments/hf_reference/families_table.py` writes."""

import importlib.util
import sys
from pathlib import Path

import pytest

from cases.hf import FAMILIES, model_type
from moejax.interop.hf.families import FAMILIES as TABLES

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "experiments" / "hf_reference" / "families_table.py"
    spec = importlib.util.spec_from_file_location("families_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["families_table"] = module
    spec.loader.exec_module(module)
    return module


def rows_of(script):
    page = (REPOSITORY / "docs" / "families.md").read_text()
    _, _, rest = page.partition(script.BEGIN)
    table, _, _ = rest.partition(script.END)
    assert table.startswith(script.HEAD)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row for row in rows}


def test_every_family_and_every_checkpoint_is_in_the_table(script):
    rows = rows_of(script)
    assert list(rows) == list(TABLES)
    for name, family in TABLES.items():
        own = [folder for folder in FAMILIES if model_type(folder) == name]
        listed = rows[name][2].split(", ")
        assert rows[name][1] == script.models_of(family)
        if own:
            assert listed == own
        else:
            assert rows[name][2:] == ["none of its own"]


def test_differences_are_rounded_up(script):
    assert script.shown(1.01e-6) == "2e-6"
    assert script.shown(3e-7) == "3e-7"
    assert script.shown(9.5e-7) == "1e-6"
    assert script.shown(0.0) == ""
