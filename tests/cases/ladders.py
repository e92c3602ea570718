"""Measurements of ladders that were never trained: losses of known laws, and noise."""

import numpy as np

from moejax.sweeps.ladder.law import Law
from moejax.sweeps.ladder.results import Measurements

BUDGETS = (1e12, 4e12, 1.6e13, 6e13)
LAWS = {"dense": Law(1.0, 80.0, 0.16), "experts": Law(1.0, 110.0, 0.175)}


def measurements(laws=None, *, noise=0.0, shared=0.0, num_seeds=3, seed=0, budgets=BUDGETS):
    """Returns measurements of laws.

    Args:
      laws: by arm.
      noise: standard deviation of a run's loss, in nats.
      shared: that of what all arms of a rung and a seed have in common.
      num_seeds: of each arm and rung.
      seed: of the noise.
      budgets: of the rungs.
    """
    laws = LAWS if laws is None else laws
    random = np.random.default_rng(seed)
    shape = (len(budgets), num_seeds)
    common_RS = random.normal(0, shared, shape) if shared else np.zeros(shape)
    loss = {}
    for arm, law in laws.items():
        mean_R1 = np.array([[law.loss(budget)] for budget in budgets])
        loss[arm] = mean_R1 + common_RS + random.normal(0, noise, shape)
    sizes_R = np.sqrt(np.array(budgets) / 120)
    ratios = {arm: 1.0 + 3 * number for number, arm in enumerate(laws)}
    return Measurements(
        budgets=tuple(budgets),
        seeds=tuple(range(num_seeds)),
        loss=loss,
        seconds={arm: np.full(shape, 10.0 * ratios[arm]) for arm in laws},
        params_total={arm: sizes_R * ratios[arm] for arm in laws},
        params_active=dict.fromkeys(laws, sizes_R),
        tokens={arm: np.array(budgets) / 6 / sizes_R for arm in laws},
    )
