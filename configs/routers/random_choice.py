"""A router that draws experts at random: a baseline that any learned router must beat.

  moejax train --config=configs/routers/random_choice.py --workdir=runs/routers/random_choice

Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "random"
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    return config
