"""Every expert for every token, weighted by its probability: the upper bound for top-k routing.

  moejax train --config=configs/routers/dense.py --workdir=runs/routers/dense

It costs eight times the arithmetic. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "dense"
    config.moe.top_k = 16
    config.moe.renormalize = False
    config.moe.balance_weight = 0.0
    return config
