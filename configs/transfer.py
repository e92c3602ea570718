"""The tiny model in the parametrisation in which learning rates of small models hold for large.

  moejax coordcheck --config=configs/transfer.py
  moejax train --config=configs/transfer.py --workdir=runs/transfer --config.model.d_model=256 \
      --config.model.d_ff=1024 --config.moe.d_expert=512 --config.attention.num_heads=8

The learning rate is that of the base: width 64, 4 layers, 2 experts per token.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    config.attention.num_kv_heads = 4
    config.optimizer.learning_rate = 0.01
    config.mup.base_width = 64
    config.mup.base_d_ff = 256
    config.mup.base_d_expert = 128
    config.mup.base_depth = 4
    config.mup.base_top_k = 2
    return config
