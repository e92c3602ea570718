"""The default: a small MoE language model on presidential addresses, minutes on a laptop.

  make train
  moejax train --config=configs/tiny_moe.py --workdir=runs/tiny_moe
"""

from ml_collections import ConfigDict

from moejax import config as moejax_config


def get_config(arg: str = "") -> ConfigDict:
    config = moejax_config.default()
    return config
