"""The layer of Qwen1.5-MoE: weights not renormalised, shared experts with a sigmoid gate.

  moejax train --config=configs/routers/qwen2_moe.py --workdir=runs/routers/qwen2_moe

The balance loss is scaled as in Transformers: K at balance. Everything else is as in
`softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.renormalize = False
    config.moe.num_shared_experts = 2
    config.moe.shared_combine = "gated"
    config.moe.balance_weight = 0.005
    config.moe.balance_convention = "times_k"
    return config
