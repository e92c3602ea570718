"""Selection from a balanced transport plan in training, plain top-k in evaluation (S-BASE).

  moejax train --config=configs/routers/sinkhorn.py --workdir=runs/routers/sinkhorn

Clark et al. 2022. A plan over all tokens of packed rows looks at later tokens and at other
documents: a causal model needs `moe.allow_noncausal`, and its training loss flatters it. There is
no auxiliary loss. Everything else is as in `softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.router = "sinkhorn"
    config.moe.sinkhorn_iterations = 10
    config.moe.allow_noncausal = True
    config.moe.balance_weight = 0.0
    return config
