"""Two levels of noisy gating: two of four groups, then two of four experts in each.

  moejax train --config=configs/routers/hierarchical.py --workdir=runs/routers/hierarchical

Shazeer et al. 2017, appendix B. Four experts of width 64 cost as much as two of 128. It has the
importance loss, but not the load loss of the paper. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "hierarchical"
    config.moe.num_groups = 4
    config.moe.top_k_groups = 2
    config.moe.top_k = 4
    config.moe.d_expert = 64
    config.moe.importance_weight = 0.1
    config.moe.balance_weight = 0.01
    return config
