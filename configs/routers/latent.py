"""Latent experts: tokens are projected to half the width before them, and back after them.

  moejax train --config=configs/routers/latent.py --workdir=runs/routers/latent

From Nemotron 3: sigmoid scores, squared ReLU, a bias added to logits, and the output of shared
experts averaged with the routed one. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sigmoid_topk"
    config.moe.select_by = "logits"
    config.moe.bias_rate = 1e-2
    config.moe.selection_bias = True
    config.moe.activation = "squared_relu"
    config.moe.d_latent = 64
    config.moe.d_expert = 256
    config.moe.num_shared_experts = 1
    config.moe.shared_combine = "averaged"
    config.moe.balance_weight = 0.0
    return config
