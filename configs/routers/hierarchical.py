"""Two levels of noisy gating: two of four groups, then two of four experts in each (Shazeer et al. 2017, appendix B).

  moejax train --config=configs/routers/hierarchical.py --workdir=runs/routers/hierarchical

Four experts of width 64 cost what two of 128 do. Importance loss; the paper's load loss is not
there. As `softmax_topk.py` but for this.
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
