"""Experts choose their tokens, two a token on average (Zhou et al. 2022).

  moejax train --config=configs/routers/expert_choice.py --workdir=runs/routers/expert_choice

They choose among the tokens of all documents of a packed row, later ones included: a causal model
needs `moe.allow_noncausal`, and both its losses flatter it. Everything else is as in
`softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "expert_choice"
    config.moe.allow_noncausal = True
    config.moe.balance_weight = 0.0
    return config
