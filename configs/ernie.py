"""ERNIE 4.5's router: softmax with a selection bias, two shared experts with biases.

  moejax train --config=configs/ernie.py --workdir=runs/ernie

Weights are divided by their sum, which counts as `renormalize_floor` if it is less. The published
models have no biases (`use_bias`). Everything else is as in `routers/softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    base = Path(__file__).with_name("routers") / "softmax_topk.py"
    config = runpy.run_path(str(base))["get_config"]()
    config.moe.selection_bias = True
    config.moe.renormalize_floor = 1e-12
    config.moe.num_shared_experts = 2
    config.moe.shared_bias = True
    return config
