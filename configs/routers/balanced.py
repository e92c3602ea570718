"""A router that assigns experts in turn: perfect balance, no information; for benchmarks.

  moejax train --config=configs/routers/balanced.py --workdir=runs/routers/balanced

Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "balanced"
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    return config
