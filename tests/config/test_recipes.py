"""The recipes of `configs/`: each resolves and says how to run it, and every option is set."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moejax.config import ROUTER_RULES, Config, leaves, resolve, to_dict

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.py"))


def load_recipe(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_its_header_says_how_to_run_it(path):
    recipe = load_recipe(path)
    source = recipe.get_config()
    assert isinstance(source, ConfigDict)
    assert source.is_locked
    assert isinstance(resolve(source), Config)
    header = recipe.__doc__
    command = f"--config={path.relative_to(ROOT).as_posix()}"
    assert header and command in header, "the header names the command that runs it"


def test_there_is_a_recipe_for_every_router():
    paths = [path for path in RECIPES if path.parent.name == "routers"]
    routers = {load_recipe(path).get_config().moe.router for path in paths}
    assert routers == ROUTER_RULES.keys()


# The reference products are for tests; every other layer is for models deeper than these.
WITHOUT_A_RECIPE = {"moe.grouped_matmul", "moe.every"}


def test_every_option_of_experts_schedules_and_alarms_is_set_by_a_recipe():
    options = {key for key, _ in leaves() if key.split(".")[0] in ("moe", "schedule", "alarms")}
    lines = "".join(path.read_text() for path in RECIPES)
    assert {key for key in options if f"config.{key} = " not in lines} == WITHOUT_A_RECIPE


def test_the_dense_twin_differs_from_the_tiny_moe_in_its_experts_alone():
    moe = to_dict(resolve(load_recipe(ROOT / "configs/tiny_moe.py").get_config()))
    dense = to_dict(resolve(load_recipe(ROOT / "configs/tiny_dense.py").get_config()))
    assert {section for section in moe if moe[section] != dense[section]} == {"moe"}
    assert dense["moe"]["num_experts"] == 0
    assert moe["moe"]["top_k"] * moe["moe"]["d_expert"] == dense["model"]["d_ff"]
