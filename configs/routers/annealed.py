"""Top-k falls from four experts per token to two over training, and so does the balance loss.

  moejax train --config=configs/routers/annealed.py --workdir=runs/routers/annealed

A short form of dense-to-sparse gating (Nie et al. 2021): four choices for the first half of the
run. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.top_k = 4
    config.schedule.top_k = "step:0.5:0.5"
    config.schedule.balance_weight = "cosine:0.2"
    return config
