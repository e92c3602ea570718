"""Rotary frequencies for texts longer than those of training."""

import math

import numpy as np
from jaxtyping import Float32

from moejax.config import AttentionConfig


def yarn_frequencies(config: AttentionConfig, num_pairs: int) -> Float32[np.ndarray, "a"]:
    """Returns the frequency of each pair of dimensions, in radians a position.

    Pairs that turn often within the original length keep their frequency, pairs that turn rarely
    are slowed down by the factor, and there is a ramp between them.

    Args:
      config: for `rope_theta`, `rope_factor`, `rope_original_length`, `rope_beta_fast`,
        `rope_beta_slow` and `rope_truncate`.
      num_pairs: half of the width of a head.

    Source: Peng et al. 2023 (YaRN), section 3.2.
    """
    pair_a = np.arange(num_pairs, dtype=np.float64)
    plain_a = config.rope_theta ** (-pair_a / num_pairs)
    first = _pair_that_turns(config.rope_beta_fast, config, num_pairs)
    last = _pair_that_turns(config.rope_beta_slow, config, num_pairs)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * num_pairs - 1)
    width = max(last - first, 1e-3)
    slowed_a = np.clip((pair_a - first) / width, 0, 1)
    frequency_a = plain_a * (1 - slowed_a) + plain_a / config.rope_factor * slowed_a
    return frequency_a.astype(np.float32)


def yarn_magnitude(config: AttentionConfig) -> float:
    """Returns the factor on rotated queries and keys, which sharpens attention.

    Source: Peng et al. 2023, section 3.4: 0.1 ln(factor) + 1 on both, unless `rope_magnitude` is
    given.
    """
    return config.rope_magnitude or 0.1 * math.log(config.rope_factor) + 1


def _pair_that_turns(times: float, config: AttentionConfig, num_pairs: int) -> float:
    """Returns which pair turns that many times within the original length."""
    turns_of_first = config.rope_original_length / (2 * math.pi)
    return num_pairs * math.log(turns_of_first / times) / math.log(config.rope_theta)
