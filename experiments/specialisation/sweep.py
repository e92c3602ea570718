"""`configs/domains_moe.py` with three seeds, the same models before training, and the dense twin.

  moejax sweep --config=experiments/specialisation/sweep.py --dir=runs/specialisation
  python experiments/specialisation/analysis.py

README.md beside this file has the question, what was predicted, and the answer.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

BASE = Path(__file__).parents[2] / "configs/domains_moe.py"

CONDITIONS: dict[str, dict[str, Any]] = {
    "moe": {},
    "untrained": {
        "train.num_steps": 1,
        "train.eval_every": 0,
        "optimizer.learning_rate": 1e-9,
    },
    "dense": {"moe.num_experts": 0},
}
"""What each condition changes in the recipe."""

NUM_SEEDS = {"moe": 3, "untrained": 3, "dense": 1}


def get_config() -> ConfigDict:
    """Returns the recipe."""
    return runpy.run_path(str(BASE))["get_config"]()


def sweep() -> Iterator[dict[str, Any]]:
    """Yields the points of all conditions with their seeds."""
    for name, changes in CONDITIONS.items():
        for seed in range(NUM_SEEDS[name]):
            yield {**changes, "train.seed": seed}
