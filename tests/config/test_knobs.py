"""The traced scalars of a configuration."""

import dataclasses

import jax
import numpy as np

from cases.config import nested, other_value
from moejax.config import Knobs, resolve_recorded
from moejax.config.knobs import NOT_OF_MOE


def test_knobs_are_scalars_with_the_values_of_the_config():
    knob_names = [field.name for field in dataclasses.fields(Knobs)]
    of_moe = [name for name in knob_names if name not in NOT_OF_MOE]
    values = {name: other_value(f"moe.{name}")[0] for name in of_moe}
    changes = {f"moe.{name}": value for name, value in values.items()}
    changes |= {
        "moe.router": "noisy_topk",
        "optimizer.learning_rate": 2e-3,
        "train.logit_z_weight": 0.25,
        "train.seed": 2**31 - 1,
    }
    # Recorded, because the weights of the load losses do not go with a selection bias, and what is
    # read does not matter here.
    knobs = Knobs.from_config(resolve_recorded(nested(changes)))
    assert knobs.seed.dtype == np.int32
    assert int(knobs.seed) == 2**31 - 1
    assert knobs.learning_rate == np.float32(2e-3)
    assert knobs.logit_z_weight == np.float32(0.25)
    for name, value in values.items():
        assert float(getattr(knobs, name)) == np.float32(value)
    assert all(knob.shape == () for knob in jax.tree.leaves(knobs))
    assert all(getattr(knobs, name).dtype == np.float32 for name in (*of_moe, "learning_rate"))
