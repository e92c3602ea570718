"""GShard's dispatch: all first choices before second ones, slots shared by the batch.

  moejax train --config=configs/routers/gshard.py --workdir=runs/routers/gshard

Its balance loss counts first choices only (Lepikhin et al. 2020). GShard drops what overflows; here
it is rerouted to the next expert. Order by choice looks at later tokens, hence
`moe.allow_noncausal`. The second choice is always sent, where GShard draws whether it is. All
documents of the batch share the slots. Evaluation has slots, too. Everything else is as in
`softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.dispatch = "capacity"
    config.moe.capacity_factor = 1.0
    config.moe.eval_capacity_factor = 2.0
    config.moe.capacity_group = "global"
    config.moe.capacity_order = "choice"
    config.moe.overflow = "next"
    config.moe.allow_noncausal = True
    config.moe.balance_convention = "first_choice"
    return config
