"""V-MoE's router in a language model: fixed noise and batch-priority routing.

  moejax train --config=configs/routers/vmoe.py --workdir=runs/routers/vmoe

GELU experts with biases, and V-MoE's own importance and load losses, which fall by half (Riquelme
et al. 2021). Priority by weight looks at later tokens: a causal model needs `moe.allow_noncausal`,
and its training loss flatters it. All documents of a packed row share its slots. Evaluation is
dropless. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "noisy_topk"
    config.moe.router_noise = "fixed"
    config.moe.score = "softmax"
    config.moe.renormalize = False
    config.moe.noise_scale = 1.0
    config.moe.activation = "gelu"
    config.moe.expert_bias = True
    config.moe.dispatch = "capacity"
    config.moe.capacity_factor = 1.05
    config.moe.capacity_order = "weight"
    config.moe.allow_noncausal = True
    config.moe.vmoe_importance_weight = 0.01
    config.moe.vmoe_load_weight = 0.01
    config.moe.balance_weight = 0.0
    config.schedule.noise_scale = "cosine:0.1"
    config.schedule.vmoe_load_weight = "cosine:0.5"
    config.schedule.vmoe_importance_weight = "cosine:0.5"
    return config
