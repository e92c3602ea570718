"""Zero-computation experts: zero, identity and constant ones next to those with weights.

  moejax train --config=configs/routers/longcat.py --workdir=runs/routers/longcat

From MoE++ and LongCat-Flash: softmax scores, a centred selection bias, weights not renormalised.
Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.num_zero_experts = 2
    config.moe.num_identity_experts = 4
    config.moe.num_constant_experts = 2
    config.moe.top_k = 3
    config.moe.renormalize = False
    config.moe.route_scale = 6.0
    config.moe.selection_bias = True
    config.moe.bias_rate = 1e-3
    config.moe.bias_centered = True
    config.moe.balance_weight = 0.0
    return config
