"""DeepSeek-V2's router: softmax, groups ranked by their best expert, two shared experts.

  moejax train --config=configs/routers/deepseek_v2.py --workdir=runs/routers/deepseek_v2

The weights are not renormalised. The balance loss is taken over each sequence, like its
expert-level loss (DeepSeek-AI 2024, V2). Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.num_groups = 4
    config.moe.top_k_groups = 2
    config.moe.group_score = "max"
    config.moe.renormalize = False
    config.moe.num_shared_experts = 2
    config.moe.balance_weight = 0.003
    config.moe.balance_scope = "sequence"
    return config
