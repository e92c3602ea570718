"""Hash layers: a fixed table sends each token id to its experts; nothing is learned.

  moejax train --config=configs/routers/hash.py --workdir=runs/routers/hash

Roller et al. 2021. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "hash"
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    return config
