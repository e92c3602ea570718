"""docs/routers.md against the code and the results it cites."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np

from moejax.config import ROUTER_RULES, leaves

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/routers.md").read_text()


def load(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_a_row_for_every_router_that_says_whether_it_is_causal():
    rows = [
        line.split("|") for line in PAGE.split("\n### ")[0].splitlines() if line.startswith("| `")
    ]
    causal = {row[1].strip(" `"): row[6].strip() for row in rows if "moe.router" not in row[1]}
    assert causal == {
        name: "yes" if rules.is_causal else "no" for name, rules in ROUTER_RULES.items()
    }


def test_every_option_that_the_page_names_exists_and_every_option_of_experts_is_named():
    known = {key for key, _ in leaves()}
    named = set(re.findall(r"`((?:moe|schedule|model|train)\.[a-z_0-9]+)", PAGE))
    assert named <= known, named - known
    elsewhere = {
        "every",
        "first_dense",
        "num_experts",
        "top_k",
        "grouped_matmul",
        "exchange",
        "exchange_buffer",
        "exchange_chunks",
        "save_exchanged",
        "router",
        "noise_scale",
        "d_router",
    }
    unnamed = (
        {key for key in known if key.startswith("moe.")}
        - named
        - {f"moe.{name}" for name in elsewhere}
    )
    assert unnamed <= {
        "moe.mixer_threshold",
        "moe.sinkhorn_iterations",
        "moe.slots_per_expert",
        "moe.router_noise",
    }


def test_the_measured_table_is_the_one_of_the_results_and_every_recipe_is_in_it():
    experiment = load(ROOT / "experiments/routers/run.py")
    results = json.loads(experiment.RESULTS.read_text())
    start, end = experiment.MARKS
    assert PAGE.split(start)[1].split(end)[0] == experiment.table(results)
    assert results.keys() == {path.stem for path in (ROOT / "configs/routers").glob("*.py")}
    for path in (ROOT / "configs/routers").glob("*.py"):
        assert (path.stem in experiment.SEES_THE_FUTURE) == (
            "allow_noncausal" in path.read_text().split('"""')[-1]
        )


def test_the_collapse_experiment_says_what_its_results_say():
    experiment = load(ROOT / "experiments/collapse/run.py")
    results = json.loads((ROOT / "experiments/collapse/results.json").read_text())
    assert results.keys() == experiment.SCHEMES.keys()
    assert experiment.table(results) in (ROOT / "experiments/collapse/README.md").read_text()
    for scheme, by_seed in results.items():
        assert len(by_seed) == 3
        dead = [run["dead"][-1] for run in by_seed.values()]
        violation = np.mean([run["eval_max_violation"] for run in by_seed.values()])
        if scheme == "none":
            assert min(dead) > 3 and violation > 5
        elif scheme not in ("none_sigmoid", "importance_no_noise"):
            assert max(dead) == 0 and violation < 3, scheme
