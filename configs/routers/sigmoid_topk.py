"""DeepSeek-V3's router: sigmoid scores, groups of experts, and a selection bias.

  moejax train --config=configs/routers/sigmoid_topk.py --workdir=runs/routers/sigmoid_topk

It has a shared expert, and no auxiliary loss over the batch. The bias moves by 2e-3 a step (1e-3 in
the much longer published run) and stays constant in the last tenth; the loss within sequences has
weight 1e-4 in the first half, then half of it (DeepSeek-AI 2024). Everything else is as in
`softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sigmoid_topk"
    config.moe.num_groups = 4
    config.moe.top_k_groups = 2
    config.moe.route_scale = 2.5
    config.moe.selection_bias = True
    config.moe.bias_rate = 2e-3
    config.moe.num_shared_experts = 1
    config.moe.balance_weight = 0.0
    config.moe.sequence_balance_weight = 1e-4
    config.moe.z_weight = 0.0
    config.schedule.bias_rate = "step:0.9:0"
    config.schedule.sequence_balance_weight = "step:0.5:0.5"
    return config
