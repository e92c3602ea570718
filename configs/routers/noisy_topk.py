"""Noisy top-k gating with importance and load losses (Shazeer et al. 2017).

  moejax train --config=configs/routers/noisy_topk.py --workdir=runs/routers/noisy_topk

Clean logits and noise start at zero; both losses have weight 0.1, and there is no balance loss. The
importance loss falls by half over the run, and the load loss rises over its first tenth. Everything
else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "noisy_topk"
    config.moe.importance_weight = 0.1
    config.moe.load_weight = 0.1
    config.moe.balance_weight = 0.0
    config.moe.z_weight = 0.0
    config.schedule.importance_weight = "linear:0.5"
    config.schedule.load_weight = "warmup:0.1"
    return config
