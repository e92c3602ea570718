"""Layers that differ: the first routes by a hash of the token, the last to a single expert.

  moejax train --config=configs/routers/per_layer.py --workdir=runs/routers/per_layer

There are four layers, of which two in the middle are equal. Everything else is as in
`softmax_topk.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("softmax_topk.py")))["get_config"]()
    config.moe.per_layer = "0: router=hash; -1: top_k=1 renormalize=False d_expert=256"
    config.model.num_layers = 4
    return config
