"""Top-1 routing without balancing, and with each scheme that may prevent its collapse.

  moejax sweep --config=experiments/collapse/sweep.py --seeds=3 --dir=runs/collapse
  python experiments/collapse/analysis.py

README.md beside this file has the question, what was predicted, and the answer.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

BASE = Path(__file__).parents[2] / "configs/routers/softmax_topk.py"

SIGMOID = {"moe.router": "sigmoid_topk", "moe.score": "sigmoid"}
NOISY = {"moe.router": "noisy_topk", "moe.score": "softmax"}

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {},
    "none_sigmoid": SIGMOID,
    "balance": {"moe.balance_weight": 0.01},
    "sequence_balance": {"moe.sequence_balance_weight": 0.01},
    "importance": {**NOISY, "moe.importance_weight": 0.1},
    "importance_load": {**NOISY, "moe.importance_weight": 0.1, "moe.load_weight": 0.1},
    "importance_load_vmoe": {
        **NOISY,
        "moe.router_noise": "fixed",
        "moe.vmoe_importance_weight": 0.1,
        "moe.vmoe_load_weight": 0.1,
    },
    "importance_no_noise": {"moe.importance_weight": 0.1},
    "bias": {**SIGMOID, "moe.selection_bias": True, "moe.bias_rate": 5e-3},
    "quantile": {"moe.router": "quantile", "moe.score": "sigmoid"},
    "sinkhorn": {"moe.router": "sinkhorn", "moe.score": "sigmoid", "moe.allow_noncausal": True},
}
"""What each scheme changes in the recipe: top-1 softmax routing, no balancing."""


def get_config() -> ConfigDict:
    """Returns the base of the routers' recipes with one expert a token and no auxiliary loss."""
    config = runpy.run_path(str(BASE))["get_config"]()
    config.moe.top_k = 1
    config.moe.renormalize = False
    config.moe.d_expert = 256
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    config.train.eval_every = 0
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Yields a point for each scheme."""
    yield from SCHEMES.values()
