"""Models of each family against what the reference implementation computes of the same weights."""

import functools
from pathlib import Path

import pytest

from cases.hf import FAMILIES, FOLDER, each_family, model_type, reference
from moejax.interop.hf.conversion.compare import compare
from moejax.interop.hf.families import FAMILIES as TABLES
from moejax.interop.hf.load import load_model, read_config

of_each = pytest.mark.parametrize("family", each_family())


@functools.cache
def comparison(family):
    _, table = read_config(FOLDER / family)
    return compare(load_model(FOLDER / family), table, reference(family))


@of_each
def test_outputs_losses_and_gradients_are_those_of_the_reference(family):
    beyond = {
        each.name: (each.relative, each.tolerance)
        for each in comparison(family).differences
        if not each.is_within
    }
    assert beyond == {}
    assert comparison(family).not_compared == []


@of_each
def test_differences_are_about_those_of_the_page(family):
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{model_type(family)}` |")]
    outputs, gradients = row.split(" | ")[3:5]
    for each in comparison(family).differences:
        on_page = float(gradients if each.name.startswith("grad") else outputs)
        # Another machine rounds otherwise.
        assert each.relative <= 5 * on_page, each


@of_each
def test_tokens_visit_the_experts_of_the_reference(family):
    recorded = [name for name in reference(family) if name.endswith(".indices")]
    routers = [name.removesuffix(".indices") for name in recorded]
    assert comparison(family).experts_agree == dict.fromkeys(routers, True)


@of_each
def test_greedy_text_with_a_cache_is_that_of_the_reference(family):
    expected = {"gen.tokens": True, "lpad.gen.tokens": True}
    assert comparison(family).tokens_agree == expected


def test_every_family_has_a_table_of_its_name():
    assert {name: table.model_type for name, table in TABLES.items()} == {
        name: name for name in TABLES
    }
    assert {model_type(family) for family in FAMILIES} <= set(TABLES)
