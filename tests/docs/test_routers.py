"""docs/routers.md against the code and the results it cites."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np

from moejax.cli import main
from moejax.config import ROUTER_RULES, leaves, resolve
from moejax.sweeps.arms import plan_arms

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/routers.md").read_text()


def load(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_says_of_every_router_whether_it_is_causal():
    top = PAGE.split("\n### ")[0]
    rows = [line.split("|") for line in top.splitlines() if line.startswith("| `")]
    causal = {row[1].strip(" `"): row[6].strip() for row in rows if "moe.router" not in row[1]}
    expected = {name: rules.is_causal for name, rules in ROUTER_RULES.items()}
    assert {name: cell == "yes" for name, cell in causal.items()} == expected
    assert set(causal.values()) <= {"yes", "no"}


ELSEWHERE = (
    "every", "first_dense", "num_experts", "top_k", "grouped_matmul", "exchange", "exchange_buffer",
    "exchange_chunks", "save_exchanged", "router", "noise_scale", "d_router",
)  # fmt: skip
"""Options of experts that other pages describe."""

OPTIONS_OF_ONE_ROUTER = {
    "moe.mixer_threshold", "moe.sinkhorn_iterations", "moe.slots_per_expert", "moe.router_noise",
}  # fmt: skip


def test_options_on_the_page_exist_and_every_option_of_experts_is_named():
    known = {key for key, _ in leaves()}
    named = set(re.findall(r"`((?:moe|schedule|model|train)\.[a-z_0-9]+)", PAGE))
    assert named <= known, named - known
    of_experts = {key for key in known if key.startswith("moe.")}
    unnamed = of_experts - named - {f"moe.{name}" for name in ELSEWHERE}
    assert unnamed <= OPTIONS_OF_ONE_ROUTER


def test_the_measured_table_shows_the_results_of_every_recipe():
    experiment = load(ROOT / "experiments/routers/analysis.py")
    results = json.loads(experiment.RESULTS.read_text())
    start, end = experiment.MARKS
    assert PAGE.split(start)[1].split(end)[0] == experiment.table(results)
    assert results.keys() == {path.stem for path in (ROOT / "configs/routers").glob("*.py")}
    for path in (ROOT / "configs/routers").glob("*.py"):
        _, _, code = path.read_text().rpartition('"""')
        assert (path.stem in experiment.SEES_THE_FUTURE) == ("allow_noncausal" in code)


def test_the_sweep_of_routers_trains_every_recipe_as_it_is(capsys):
    sweep = load(ROOT / "experiments/routers/sweep.py")
    results = json.loads((ROOT / "experiments/routers/results.json").read_text())
    plan = plan_arms(sweep.get_config().to_dict(), sweep.sweep())
    names = list(sweep.read_points())
    assert names == sorted(results) and len(plan.arms) == len(names)
    for name, arm in zip(names, plan.arms, strict=True):
        assert arm.config == resolve(sweep.read_recipe(name)), name
        recorded = results[name]["parameters_total"], results[name]["parameters_active"]
        assert (arm.count.total, arm.count.active) == recorded, name
    # The argument of the recipe chooses one.
    recipe = ROOT / "experiments/routers/sweep.py"
    assert main(["sweep", f"--config={recipe}:hash", "--dry-run", "--json"]) == 0
    (arm,) = json.loads(capsys.readouterr().out)["list"]
    assert arm["id"] == plan.arms[names.index("hash")].id


def test_the_page_of_the_collapse_experiment_agrees_with_its_results():
    experiment = load(ROOT / "experiments/collapse/analysis.py")
    results = json.loads((ROOT / "experiments/collapse/results.json").read_text())
    sweep = load(ROOT / "experiments/collapse/sweep.py")
    assert list(results) == list(sweep.SCHEMES)
    plan = plan_arms(sweep.get_config().to_dict(), sweep.sweep())
    assert len(plan.arms) == len(results) and not plan.duplicates
    assert experiment.table(results) in (ROOT / "experiments/collapse/README.md").read_text()
    for scheme, by_seed in results.items():
        assert len(by_seed) == 3
        dead = [run["dead"][-1] for run in by_seed.values()]
        violation = np.mean([run["eval_max_violation"] for run in by_seed.values()])
        if scheme == "none":
            assert min(dead) > 3 and violation > 5
        elif scheme not in ("none_sigmoid", "importance_no_noise"):
            assert max(dead) == 0 and violation < 3, scheme
