"""Rotary frequencies for longer texts against a loop over pairs."""

import math

import numpy as np
import pytest

from moejax.config import AttentionConfig
from moejax.nn.rope_scaling import rope_frequencies, rope_magnitude


@pytest.mark.parametrize("truncate", [True, False])
def test_frequencies_stay_above_the_ramp_are_divided_below_it_and_go_over_within_it(truncate):
    config = AttentionConfig(
        rope_scaling="yarn", rope_factor=8.0, rope_original_length=512, rope_truncate=truncate
    )
    num_pairs, theta = 32, 10_000.0
    plain = [theta ** (-i / num_pairs) for i in range(num_pairs)]
    # Pair i turns 512 * theta^(-i/32) / (2 pi) times: 32 times at i = 3.25, once at i = 15.29.
    ends = [
        num_pairs * math.log(512 / (2 * math.pi * turns)) / math.log(theta) for turns in (32, 1)
    ]
    assert ends == pytest.approx([3.25, 15.29], abs=0.01)
    first, last = (3, 16) if truncate else ends
    expected = []
    for i, frequency in enumerate(plain):
        slowed = min(max((i - first) / (last - first), 0), 1)
        expected.append(frequency * (1 - slowed) + frequency / 8 * slowed)
    found = rope_frequencies(config, num_pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[:4] == pytest.approx(plain[:4]) and found[16:] * 8 == pytest.approx(plain[16:])


def test_the_magnitude_is_that_of_the_factor_unless_it_is_given():
    assert rope_magnitude(AttentionConfig(rope_scaling="yarn", rope_factor=8.0)) == pytest.approx(
        1.2079, abs=1e-4
    )
    assert (
        rope_magnitude(AttentionConfig(rope_scaling="yarn", rope_factor=8.0, rope_magnitude=1.0))
        == 1.0
    )
