"""NLLB-MoE's regularisation: expert output masking, and survivors share the weight.

  moejax train --config=configs/routers/nllb.py --workdir=runs/routers/nllb

The experts have ReLU and biases. A fifth of all choices lose their expert's output in training
(Costa-jussa et al. 2022), after a warm-up; the capacity factor falls from 1.5 to 1.2. All documents
of a packed row share its slots. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.activation = "relu"
    config.moe.expert_bias = True
    config.moe.expert_dropout = 0.2
    config.moe.dispatch = "capacity"
    config.moe.capacity_factor = 1.5
    config.moe.overflow = "renormalize"
    config.schedule.expert_dropout = "warmup:0.5"
    config.schedule.capacity_factor = "linear:0.8"
    config.schedule.z_weight = "exponential:0.1"
    return config
