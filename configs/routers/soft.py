"""Soft MoE: experts work on mixtures of all tokens of a sequence (Puigcerver et al. 2023).

  moejax train --config=configs/routers/soft.py --workdir=runs/routers/soft

Mixtures hold the tokens of all documents of a packed row, later ones included, so a causal model
needs `moe.allow_noncausal`, and can read the answer: its losses mean nothing as a language model's.
Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "soft"
    config.moe.slots_per_expert = 8
    config.moe.allow_noncausal = True
    config.moe.balance_weight = 0.0
    return config
