"""Seeds have one range, which every flag and every argument checks."""

import numpy as np
import pytest

from moejax.config import ConfigError, resolve
from moejax.inspection.analysis.trace import spread_rows
from moejax.inspection.counterfactuals.evaluate import counterfactuals
from moejax.seeds import LARGEST_SEED, SeedError, check_seed

WRONG = [-1, LARGEST_SEED + 1, 2**32, 2**64, 10**40]


def test_a_seed_out_of_range_is_refused_wherever_one_is_given():
    for seed in WRONG:
        for use_seed in (
            lambda seed: check_seed("seed", seed),
            lambda seed: spread_rows(10, 2, seed),
            lambda seed: counterfactuals("nowhere", seed=seed),
        ):
            message = f"seed={seed} must be an integer between 0 and 2147483647"
            with pytest.raises(SeedError, match=message):
                use_seed(seed)
        with pytest.raises(ConfigError, match=r"train\.seed"):
            resolve({"train": {"seed": seed}})
    for seed in (0, LARGEST_SEED):
        check_seed("seed", seed)
        assert resolve({"train": {"seed": seed}}).train.seed == seed
        assert len(spread_rows(10, 2, seed)) == 2


def test_a_seed_of_numpy_is_a_seed():
    check_seed("seed", np.int64(3))
    with pytest.raises(SeedError, match="seed=-3 must be"):
        check_seed("seed", np.int64(-3))
