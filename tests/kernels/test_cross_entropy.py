"""Cross-entropy in chunks of positions: values, gradients, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from moejax.kernels import cross_entropy as module
from moejax.kernels.cross_entropy import Head, cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 3, 20, 8, 11


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden_BLD = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype)
    weight_VD = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), dtype)
    targets_BL = jnp.asarray(rng.integers(0, VOCAB - 2, (BATCH, LENGTH)), jnp.int32)
    factors_BL = jnp.asarray(rng.uniform(size=(BATCH, LENGTH)), jnp.float32)
    return hidden_BLD, weight_VD, targets_BL, factors_BL


def nats_by_hand(hidden_BLD, weight_VD, targets_BL, num_tokens):
    """Cross-entropy over the first `num_tokens` ids, in float64."""
    weight_TD = np.float64(weight_VD)[:num_tokens]
    logits_BLT = np.einsum("BLD,TD->BLT", np.float64(hidden_BLD), weight_TD)
    log_total_BL = np.log(np.exp(logits_BLT).sum(-1))
    chosen_BL1 = np.take_along_axis(logits_BLT, np.asarray(targets_BL)[..., None], -1)
    return log_total_BL - chosen_BL1[..., 0]


@pytest.mark.parametrize("num_tokens", [VOCAB, VOCAB - 2])
@pytest.mark.parametrize("largest", [2**23, 200, 1])  # one chunk, 4 chunks, each position alone
def test_cross_entropy_is_that_of_all_logits_in_chunks_of_any_size(
    monkeypatch, largest, num_tokens
):
    monkeypatch.setattr(module, "LARGEST_CHUNK", largest)
    hidden_BLD, weight_VD, targets_BL, _ = inputs()
    run = jax.jit(lambda *arrays: cross_entropy(*arrays))  # compiled again for each size
    nats_BL = run(hidden_BLD, Head(weight_VD, num_tokens), targets_BL)
    oracle.assert_close(nats_BL, nats_by_hand(hidden_BLD, weight_VD, targets_BL, num_tokens))


def gradients(largest, monkeypatch, dtype=jnp.float32, **parts):
    monkeypatch.setattr(module, "LARGEST_CHUNK", largest)
    hidden_BLD, weight_VD, targets_BL, factors_BL = inputs(dtype)

    def loss(hidden_BLD, weight_VD):
        nats_BL = cross_entropy(hidden_BLD, Head(weight_VD, VOCAB - 2), targets_BL, **parts)
        return (nats_BL * factors_BL).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden_BLD, weight_VD)


# 3 chunks and 7 do not divide 20 positions; with parts, a chunk takes the same number of each part.
@pytest.mark.parametrize(
    ("largest", "parts"),
    [
        (230, {}),
        (100, {}),
        (115, {"num_parts": 2, "length_parts": 2}),
        (10, {"num_parts": 4, "length_parts": 4}),
    ],
)
def test_gradients_are_those_of_all_logits_at_once(monkeypatch, largest, parts):
    expected = gradients(2**23, monkeypatch)
    oracle.assert_close(gradients(largest, monkeypatch, **parts), expected)
    assert float(jnp.abs(expected[1][-2:]).max()) == 0  # ids that are no token learn nothing


def test_the_gradient_of_the_head_is_summed_over_chunks_in_float32(monkeypatch):
    # Every position adds the same to the gradient: in bfloat16 the sum of 512 chunks would stop
    # growing at 256.
    length = 512
    monkeypatch.setattr(module, "LARGEST_CHUNK", 1)
    hidden_BLD = jnp.ones((1, length, 1), jnp.bfloat16)
    targets_BL = jnp.zeros((1, length), jnp.int32)

    def loss(weight_VD):
        return cross_entropy(hidden_BLD, Head(weight_VD, 2), targets_BL).sum()

    gradient_VD = jax.jit(jax.grad(loss))(jnp.zeros((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(np.float32(gradient_VD)[:, 0], [-length / 2, length / 2])
