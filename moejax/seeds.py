"""Seeds: one range for all of them, so that none is silently taken modulo something."""

import numpy as np

LARGEST_SEED = 2**31 - 1
"""A seed is an int32 on the device, and at least 0."""


class SeedError(ValueError):
    """A seed out of range."""


def check_seed(name: str, seed: int | np.integer) -> None:
    """Raises `SeedError` unless `seed` is an integer from 0 to `LARGEST_SEED`.

    Args:
      name: what the caller calls the seed, for the message.
      seed: as it was given.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed <= LARGEST_SEED:
        raise SeedError(
            f"{name}={seed} must be an integer between 0 and {LARGEST_SEED}; use another"
        )
