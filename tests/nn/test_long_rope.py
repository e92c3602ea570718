"""LongRoPE: factors on wavelengths, and a magnitude that follows the longest text."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from cases.config import refusal
from moejax.config import AttentionConfig
from moejax.nn.long_rope import long_rope_frequencies, long_rope_score_factor
from moejax.nn.positions import rotate_by_config

CONFIG = AttentionConfig(
    head_dim=6,
    rope_theta=100.0,
    rope_scaling="longrope",
    rope_wavelengths="1, 1.5,4",
    rope_original_length=4,
    rope_magnitude=1.1,
    rope_long_magnitude=1.3,
)


def test_each_pair_turns_more_slowly_by_its_factor():
    expected = [1.0, 100 ** (-1 / 3) / 1.5, 100 ** (-2 / 3) / 4]
    np.testing.assert_allclose(long_rope_frequencies(CONFIG, 3), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("segments", "magnitude"),
    [
        ([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]], 1.1),  # no text has more than 4 tokens
        ([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], 1.3),
    ],
)
def test_the_longest_text_decides_on_the_magnitude(segments, magnitude):
    positions_BL = jnp.broadcast_to(jnp.arange(5), (2, 5))
    factor = long_rope_score_factor(CONFIG, positions_BL, jnp.array(segments))
    assert float(factor) == pytest.approx(magnitude**2)
    # The factor on queries alone gives the products of both with the magnitude.
    rng = np.random.default_rng(0)
    q, k = jnp.float32(rng.normal(size=(2, 2, 5, 1, 6)))
    plain = dataclasses.replace(CONFIG, rope_magnitude=0.0, rope_long_magnitude=0.0)
    assert long_rope_score_factor(plain, positions_BL, None) == 1
    rotated_q = rotate_by_config(q, positions_BL, CONFIG, factor=factor)
    rotated_k = rotate_by_config(k, positions_BL, CONFIG)
    plain_q, plain_k = (rotate_by_config(each, positions_BL, plain) for each in (q, k))
    found = jnp.einsum("BLHA,BSHA->BLS", rotated_q, rotated_k)
    products = jnp.einsum("BLHA,BSHA->BLS", plain_q * magnitude, plain_k * magnitude)
    oracle.assert_close(found, products)


def test_without_padding_all_positions_count():
    positions_B1 = jnp.array([[3], [4]])
    assert float(long_rope_score_factor(CONFIG, positions_B1, None)) == pytest.approx(1.3**2)
    assert float(long_rope_score_factor(CONFIG, positions_B1 - 1, None)) == pytest.approx(1.1**2)


def test_what_cannot_be_is_refused():
    longrope = {"attention.rope_scaling": "longrope", "attention.head_dim": 4}
    for text in ("", "1, x", "1, 0"):
        message = refusal(longrope | {"attention.rope_wavelengths": text})
        assert "must list a number above 0 for each pair" in message
    message = refusal(longrope | {"attention.rope_wavelengths": "1, 2, 3"})
    assert "has 3 factors; it must have 2" in message
    switching = {
        "attention.rope_wavelengths": "1, 2",
        "attention.rope_long_magnitude": 1.5,
        "attention.rope_original_length": 8,
        "train.accumulation": 2,
    }
    assert "train.accumulation=2 must be 1" in refusal(longrope | switching)
