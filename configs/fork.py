"""Runs of the tiny model that begin with the weights of another one.

  moejax train --config=configs/fork.py:trunk --workdir=runs/trunk
  moejax train --config=configs/fork.py:decay --init=runs/trunk:200 --workdir=runs/decay_200
  moejax train --config=configs/fork.py:decay --init=runs/trunk:400 --workdir=runs/decay_400 \
      --config.train.num_steps=500
  moejax train --config=configs/fork.py:experts --init=runs/trunk --workdir=runs/experts

`trunk` keeps its learning rate; `decay` goes on from one of its steps and lets the rate fall, so
that one trunk gives the model after several lengths of training. `experts` has twice as many,
copies at first, and a router that begins afresh. `frozen` trains all but routers and embeddings.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

NAMES = ("trunk", "decay", "experts", "frozen")


def get_config(name: str = "trunk") -> ConfigDict:
    """Returns the recipe of a run: trunk, decay, experts or frozen."""
    if name not in NAMES:
        raise ValueError(f"fork has no {name}; use {', '.join(NAMES)}")
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.0
    config.train.keep_checkpoints = 8
    if name != "trunk":
        config.init.source = "runs/trunk"
    if name == "decay":
        config.init.state = "all"
        config.optimizer.decay_fraction = 0.2
        config.train.num_steps = 250
    if name == "experts":
        config.moe.num_experts = 16
        config.init.resize = "copy"
        config.init.exclude = "router"
    if name == "frozen":
        config.optimizer.frozen = "router, embedding"
    return config
