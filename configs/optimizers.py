"""The tiny model with another optimizer, to compare it.

  moejax train --config=configs/optimizers.py --workdir=runs/muon
  moejax train --config=configs/optimizers.py:lion --workdir=runs/lion

`muon`: updates of matrices are orthogonal, Adam trains the rest. `muonh`: weights of matrices keep
their norm, too. `adafactor`, with almost no moments; `lion`, with one, in bfloat16, and smaller
steps for routers and embeddings; `sgd`, whose experts are clipped apart. Everything else is as in
`tiny_moe.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

NAMES = ("muon", "muonh", "adafactor", "lion", "sgd")


def get_config(name: str = "muon") -> ConfigDict:
    """Returns the recipe of an optimizer: muon, muonh, adafactor, lion or sgd."""
    if name not in NAMES:
        raise ValueError(f"optimizers has no {name}; use {', '.join(NAMES)}")
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    config.optimizer.name = name
    if name == "muon":
        config.optimizer.muon_momentum = 0.95
        config.train.logit_z_weight = 1e-4
        config.optimizer.learning_rate = 1e-2
        config.optimizer.adam_rate = 0.5
    if name == "muonh":
        config.optimizer.learning_rate = 2e-2
        config.optimizer.adam_rate = 0.25
    if name == "adafactor":
        config.optimizer.learning_rate = 3e-2
    if name == "lion":
        config.optimizer.learning_rate = 5e-4
        config.optimizer.beta2 = 0.99
        config.optimizer.weight_decay = 1.0
        config.optimizer.moments_dtype = "bfloat16"
        config.optimizer.groups = "router: rate=0.5; embedding: rate=0.5 weight_decay=0"
    if name == "sgd":
        config.optimizer.learning_rate = 0.3
        config.optimizer.weight_decay = 1e-4
        config.optimizer.groups = "experts: clip_norm=0.5"
    return config
