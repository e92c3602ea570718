"""The layer of gpt-oss: softmax over the selected logits, biases, clamped SwiGLU.

  moejax train --config=configs/routers/gpt_oss.py --workdir=runs/routers/gpt_oss

The biases are in the router and in the experts. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.score = "softmax_after"
    config.moe.router_bias = True
    config.moe.activation = "clamped_swiglu"
    config.moe.activation_limit = 7.0
    config.moe.expert_bias = True
    return config
