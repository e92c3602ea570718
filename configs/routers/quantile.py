"""Quantile balancing: each expert asks for the logit at which it would have got its share of the last batch.

  moejax train --config=configs/routers/quantile.py --workdir=runs/routers/quantile

No auxiliary loss and no rate to tune. As `softmax_topk.py` but for this.
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
