"""Switch Transformer: one expert a token, weighted by its probability; capacity factor 1.25.

  moejax train --config=configs/routers/switch.py --workdir=runs/routers/switch

ReLU experts, jitter on the router's input, and a balance loss over each device's tokens (Fedus et
al. 2021). All documents of a packed row share its slots. One expert of width 256 costs as much as
two of 128. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "switch"
    config.moe.top_k = 1
    config.moe.renormalize = False
    config.moe.d_expert = 256
    config.moe.activation = "relu"
    config.moe.jitter = 1e-2
    config.moe.dispatch = "capacity"
    config.moe.balance_scope = "device"
    return config
