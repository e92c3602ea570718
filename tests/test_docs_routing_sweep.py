"""experiments/routing_sweep/README.md against the results it cites."""

import json
import runpy
from pathlib import Path

import pytest

from moejax.sweeps.arms import plan_arms

FOLDER = Path(__file__).parents[1] / "experiments/routing_sweep"
PAGE = (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(FOLDER / "figures.py"))


@pytest.fixture(scope="module")
def rows():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_tables_are_those_of_the_results(figures, rows):
    start, end = figures["MARKS"]
    assert PAGE.split(start)[1].split(end)[0] == figures["write_tables"](figures["settings"](rows))


def test_what_is_said_of_experts_and_k_holds_without_the_noisy_router_and_with_it(figures, rows):
    moe, _ = figures["split"](figures["settings"](rows))
    is_noisy = moe["override/router"] == "noisy_topk"
    without, of_noisy = (figures["effects"](table) for table in (moe[~is_noisy], moe[is_noisy]))
    few, many = without["num_experts"].table["mean"]
    one, four = without["top_k"].table["mean"]
    text = " ".join(PAGE.split())
    assert f"without the noisy router, does nothing by itself: {one:.3f} with 1, {four:.3f} with 4." in text
    assert f"Over all balancings: {few:.3f} with 8, {many:.3f} with 32." in text
    seeds = (moe[~is_noisy][f"{figures['LOSS']}/se"] * 3**0.5).mean()
    assert max(abs(few - many), abs(one - four)) < seeds
    few, many = of_noisy["num_experts"].table["mean"]
    one, four = of_noisy["top_k"].table["mean"]
    assert f"32 experts are {many - few:.3f} nats worse than 8, and K = 1 is {one - four:.3f} worse than K = 4" in text


def test_the_results_are_those_of_the_sweep_that_the_recipe_describes(rows):
    recipe = runpy.run_path(str(FOLDER / "sweep.py"))
    points = [point | {"train.seed": seed} for point in recipe["sweep"]() for seed in range(3)]
    plan = plan_arms(recipe["get_config"]().to_dict(), points, match="active_params")
    assert [(arm.count.total, arm.count.active, arm.config.train.seed) for arm in plan.arms] == [
        (row["params_total"], row["params_active"], row["seed"]) for row in rows
    ]
    active = [row["params_active"] for row in rows]
    assert max(active) / min(active) < 1.01
    assert all(row["status"] == "done" for row in rows)
