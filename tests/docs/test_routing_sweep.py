"""experiments/routing_sweep/README.md against the results it cites."""

import json
import runpy
from pathlib import Path

import pandas as pd
import pytest

from moejax.sweeps.arms import plan_arms

FOLDER = Path(__file__).parents[2] / "experiments/routing_sweep"
PAGE = (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(FOLDER / "analysis.py"))


@pytest.fixture(scope="module")
def rows():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_tables_are_those_of_the_results(figures, rows):
    start, end = figures["MARKS"]
    assert PAGE.split(start)[1].split(end)[0] == figures["write_tables"](figures["arms"](rows))


def test_the_differences_in_the_text_are_those_of_the_results(figures, rows):
    moe = figures["kinds"](figures["arms"](rows))["all routers"]
    is_noisy = moe["override/router"] == "noisy_topk"
    text = " ".join(PAGE.split())

    def difference(arms, axis, level, **where):
        for name, value in where.items():
            arms = arms[arms[f"override/{name}"] == value]
        (found,) = [
            other for other in figures["effects"](arms)[axis].others if other.level == level
        ]
        return found.difference

    def interval(found, sign=1):
        low, high = sorted((sign * found.low, sign * found.high))
        return f"({low:+.3f} to {high:+.3f})"

    noisy, others = moe[is_noisy], moe[~is_noisy]
    of_experts = difference(noisy, "num_experts", 32)
    of_k = difference(noisy, "top_k", 4)
    assert f"32 experts are {of_experts.mean:.3f} nats worse than 8 {interval(of_experts)}" in text
    assert f"K = 1 is {-of_k.mean:.3f} worse than K = 4 {interval(of_k, -1)}" in text
    assert of_experts.is_told_apart and of_k.is_told_apart
    router = difference(moe, "router", "noisy_topk")
    assert f"loses {router.mean:.3f} nats against softmax {interval(router)}" in text
    for axis, level in (("num_experts", 32), ("top_k", 4), ("router", "sigmoid_topk")):
        assert not difference(others, axis, level).is_told_apart
    loss, bias = difference(others, "scheme", "loss"), difference(others, "scheme", "bias")
    assert not loss.is_told_apart and not bias.is_told_apart
    of_loss = f"the loss gains {-loss.mean:.3f} {interval(loss, -1)}"
    of_bias = f"the bias {-bias.mean:.3f} {interval(bias, -1)}"
    assert f"{of_loss} and {of_bias}" in text
    loss = difference(others, "scheme", "loss", top_k=1)
    bias = difference(others, "scheme", "bias", top_k=1)
    assert f"the bias gains {-bias.mean:.3f} {interval(bias, -1)}, which is told apart" in text
    assert f"the loss {-loss.mean:.3f} {interval(loss, -1)}, which is not" in text
    assert bias.is_told_apart and not loss.is_told_apart
    for scheme in ("loss", "bias"):
        assert abs(difference(others, "scheme", scheme, top_k=4).mean) < 0.003
    in_words = {
        "loss": "with the loss", "bias": "with the bias", "none": "without balancing",
    }  # fmt: skip
    for scheme, words in in_words.items():
        found = difference(others, "num_experts", 32, scheme=scheme)
        assert f"{words} {found.mean:+.3f} {interval(found)}" in text


def test_the_text_about_the_dense_control_agrees_with_the_results(figures, rows):
    table = figures["settings"](figures["arms"](rows))
    table = table[figures["is_moe"](table)]
    is_told_apart = pd.Series([found.is_told_apart for found in table["difference"]], table.index)
    is_noisy = table["override/router"] == "noisy_topk"
    assert is_noisy.sum() == 12
    assert not is_told_apart[~is_noisy].any() and is_told_apart[is_noisy].sum() == 7
    reach = [(found.high - found.low) / 2 for found in table["difference"][~is_noisy]]
    assert min(reach) > 0.028 and max(reach) < 0.104


def test_the_results_are_those_of_the_sweep_that_the_recipe_describes(rows):
    recipe = runpy.run_path(str(FOLDER / "sweep.py"))
    points = [point | {"train.seed": seed} for point in recipe["sweep"]() for seed in range(3)]
    plan = plan_arms(recipe["get_config"]().to_dict(), points, match="active_params")
    recorded = [(row["params_total"], row["params_active"], row["seed"]) for row in rows]
    counted = [(arm.count.total, arm.count.active, arm.config.train.seed) for arm in plan.arms]
    assert counted == recorded
    active = [row["params_active"] for row in rows]
    assert max(active) / min(active) < 1.01
    assert all(row["status"] == "done" for row in rows)
