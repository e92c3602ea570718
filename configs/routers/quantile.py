"""Quantile balancing: each expert asks for the logit that would have given it its fair share.

  moejax train --config=configs/routers/quantile.py --workdir=runs/routers/quantile

The share is measured on the last batch. There is no auxiliary loss and no rate to tune. Everything
else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "quantile"
    config.moe.score = "sigmoid"
    config.moe.balance_weight = 0.0
    return config
