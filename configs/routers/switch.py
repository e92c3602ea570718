"""Switch Transformer: one expert a token, its probability as the weight, ReLU experts, capacity 1.25.

  moejax train --config=configs/routers/switch.py --workdir=runs/routers/switch

Jitter on the router's input, balance loss of each device's tokens (Fedus et al. 2021). Slots are
those of a packed row: its documents share them. As `softmax_topk.py` but for this; one expert of
width 256 costs what two of 128 do.
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
