"""The layer of Llama 4: one expert a token, whose sigmoid score multiplies its input.

  moejax train --config=configs/routers/llama4.py --workdir=runs/routers/llama4

A shared expert runs alongside it. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sigmoid_topk"
    config.moe.top_k = 1
    config.moe.renormalize = False
    config.moe.weight_on = "input"
    config.moe.num_shared_experts = 1
    return config
