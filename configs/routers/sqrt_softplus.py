"""The score of DeepSeek-V4: the square root of a softplus, with GeGLU experts.

  moejax train --config=configs/routers/sqrt_softplus.py --workdir=runs/routers/sqrt_softplus

There are two microbatches, each with a balance loss of its own, scaled as in Levanter: 1/K at
balance. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sigmoid_topk"
    config.moe.score = "sqrt_softplus"
    config.moe.activation = "geglu"
    config.moe.balance_scope = "microbatch"
    config.moe.balance_convention = "over_k"
    config.moe.balance_weight = 0.02
    config.train.accumulation = 2
    return config
