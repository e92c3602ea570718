"""X-MoE's router: cosine between a projected token and expert vectors, with a learned temperature.

  moejax train --config=configs/routers/cosine.py --workdir=runs/routers/cosine

Chi et al. 2022. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "cosine"
    config.moe.d_router = 32
    return config
