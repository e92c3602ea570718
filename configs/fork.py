"""Runs of the tiny model that begin with the weights of another one.

  moejax train --config=configs/fork.py:trunk --workdir=runs/trunk
  moejax train --config=configs/fork.py:decay --init=runs/trunk:200 --workdir=runs/decay_200
  moejax train --config=configs/fork.py:decay --init=runs/trunk:400 --workdir=runs/decay_400 \
      --config.train.num_steps=500
  moejax train --config=configs/fork.py:experts --init=runs/trunk --workdir=runs/experts
  moejax train --config=configs/fork.py:upcycle --init=runs/tiny_dense --workdir=runs/upcycled

`trunk` keeps its learning rate; `decay` goes on from one of its steps and lets the rate fall, so
that one trunk gives the model after several lengths of training. `experts` has twice as many,
copies at first, and a router that begins afresh. `frozen` trains all but routers and embeddings.
The experts of `upcycle`, `drop` and `granular` are made of the networks of the dense model
(`tiny_dense.py`): copies, copies in part, segments of copies.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

DENSE = ("upcycle", "drop", "granular")

NAMES = ("trunk", "decay", "experts", "frozen", *DENSE)


def get_config(name: str = "trunk") -> ConfigDict:
    """Returns the recipe of a run, by one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"fork has no {name}; use {', '.join(NAMES)}")
    config = runpy.run_path(str(Path(__file__).with_name("tiny_moe.py")))["get_config"]()
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.0
    config.train.keep_checkpoints = 8
    config.train.average_decay = 0.99
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
    if name in DENSE:
        config.init.source = "runs/tiny_dense"
        config.moe.d_expert = 512
    if name == "upcycle":
        config.init.upcycle = "copy"
        config.init.upcycle_noise = 0.01
    if name == "drop":
        config.init.upcycle = "drop"
        config.init.upcycle_drop = 0.25
    if name == "granular":
        config.init.upcycle = "granular"
        config.moe.d_expert = 128
        config.moe.num_experts = 32
        config.moe.top_k = 4
    return config
