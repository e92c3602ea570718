"""Rotary frequencies, also for texts longer than those of training."""

import math

import numpy as np
from jaxtyping import Float32, Float64

from moejax.config import AttentionConfig
from moejax.nn.long_rope import long_rope_frequencies


def rope_frequencies(config: AttentionConfig, num_pairs: int) -> Float32[np.ndarray, "a"]:
    """Returns the frequency of each pair of dimensions, in radians a position.

    Args:
      config: for `rope_theta` and the leaves of `rope_scaling`.
      num_pairs: half of the dimensions that are rotated.

    Raises:
      ValueError: another `rope_scaling`.

    Source: Su et al. 2021 (RoFormer), section 3.2; `linear`: Chen et al. 2023 (position
    interpolation), equation 4, which divides positions; the others: see their functions.
    """
    if config.rope_scaling == "longrope":
        return long_rope_frequencies(config, num_pairs)
    pair_a = np.arange(num_pairs, dtype=np.float64)
    plain_a = config.rope_theta ** (-pair_a / num_pairs)
    if config.rope_scaling == "none":
        frequency_a = plain_a
    elif config.rope_scaling == "linear":
        frequency_a = plain_a / config.rope_factor
    elif config.rope_scaling == "llama3":
        frequency_a = _slow_down(plain_a, _llama3_ramp(plain_a, config), config)
    elif config.rope_scaling == "yarn":
        frequency_a = _slow_down(plain_a, _yarn_ramp(num_pairs, config), config)
    else:
        raise ValueError(f"attention.rope_scaling={config.rope_scaling} has no frequencies")
    return frequency_a.astype(np.float32)


def rope_magnitude(config: AttentionConfig) -> float:
    """Returns the factor on rotated queries and keys, which sharpens attention.

    Source: Peng et al. 2023 (YaRN), section 3.4: 0.1 ln(factor) + 1 on both, unless
    `rope_magnitude` is given.
    """
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_magnitude or 0.1 * math.log(config.rope_factor) + 1


def _slow_down(
    plain_a: Float64[np.ndarray, "a"], slowed_a: Float64[np.ndarray, "a"], config: AttentionConfig
) -> Float64[np.ndarray, "a"]:
    """Returns frequencies that are divided by the factor where `slowed_a` is 1, not where it is 0.

    In between, both are mixed.
    """
    return plain_a * (1 - slowed_a) + plain_a / config.rope_factor * slowed_a


def _llama3_ramp(
    plain_a: Float64[np.ndarray, "a"], config: AttentionConfig
) -> Float64[np.ndarray, "a"]:
    """Returns how far each frequency is slowed down: a ramp in turns within the original length.

    Source: Llama 3.1, in which `rope_beta_slow` and `rope_beta_fast` are called low and high
    frequency factors.
    """
    turns_a = config.rope_original_length * plain_a / (2 * math.pi)
    # Both are equal in Llama 4: then the ramp is a step.
    width = max(config.rope_beta_fast - config.rope_beta_slow, 1e-9)
    return np.clip((config.rope_beta_fast - turns_a) / width, 0, 1)


def _yarn_ramp(num_pairs: int, config: AttentionConfig) -> Float64[np.ndarray, "a"]:
    """Returns how far each frequency is slowed down: a ramp in pairs of dimensions.

    Pairs that turn often within the original length keep their frequency, pairs that turn rarely
    are slowed down by the factor.

    Source: Peng et al. 2023 (YaRN), section 3.2.
    """
    first = _pair_that_turns(config.rope_beta_fast, config, num_pairs)
    last = _pair_that_turns(config.rope_beta_slow, config, num_pairs)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * num_pairs - 1)
    width = max(last - first, 1e-3)
    pair_a = np.arange(num_pairs, dtype=np.float64)
    return np.clip((pair_a - first) / width, 0, 1)


def _pair_that_turns(times: float, config: AttentionConfig, num_pairs: int) -> float:
    """Returns which pair turns that many times within the original length."""
    turns_of_first = config.rope_original_length / (2 * math.pi)
    return num_pairs * math.log(turns_of_first / times) / math.log(config.rope_theta)
