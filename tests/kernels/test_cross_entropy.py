"""Cross-entropy in chunks of positions: values, gradients, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from moejax.kernels import cross_entropy as module
from moejax.kernels.cross_entropy import Head, cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 3, 20, 8, 11


def inputs():
    rng = np.random.default_rng(0)
    hidden_BLD = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    weight_VD = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets_BL = jnp.asarray(rng.integers(0, VOCAB - 2, (BATCH, LENGTH)), jnp.int32)
    factors_BL = jnp.asarray(rng.uniform(size=(BATCH, LENGTH)), jnp.float32)
    return hidden_BLD, weight_VD, targets_BL, factors_BL


def bias():
    return jnp.float32(np.random.default_rng(1).normal(size=VOCAB))


def losses_by_hand(hidden_BLD, head, targets_BL):
    """Cross-entropy over the ids that are tokens, and their log-sum-exp, in float64."""
    logits_BLV = np.einsum("BLD,VD->BLV", np.float64(hidden_BLD), np.float64(head.weight_VD))
    if head.bias_V is not None:
        logits_BLV += np.float64(head.bias_V)
    logits_BLV /= head.divisor
    if head.cap:
        logits_BLV = head.cap * np.tanh(logits_BLV / head.cap)
    logits_BLT = logits_BLV[..., : head.num_tokens]
    log_total_BL = np.log(np.exp(logits_BLT).sum(-1))
    chosen_BL1 = np.take_along_axis(logits_BLT, np.asarray(targets_BL)[..., None], -1)
    return log_total_BL - chosen_BL1[..., 0], log_total_BL


def head_of(weight_VD, bias_V, options, num_tokens=VOCAB - 2):
    """A head with a bias where its options say so, and nothing else of them."""
    others = dict(options)
    bias_V = bias_V if others.pop("has_bias", False) else None
    return Head(weight_VD, num_tokens, bias_V=bias_V, **others)


PLAIN = {}
BIASED = {"has_bias": True, "divisor": 1.5, "cap": 2.0}


@pytest.mark.parametrize(
    ("num_tokens", "options"),
    [
        (VOCAB, PLAIN),
        (VOCAB - 2, PLAIN),
        (VOCAB, {"divisor": 3.0}),
        (VOCAB, {"cap": 1.5}),
        (VOCAB - 2, BIASED),
    ],
)
@pytest.mark.parametrize("largest", [2**23, 200, 1])  # one chunk, 4 chunks, each position alone
def test_cross_entropy_is_that_of_all_logits_in_chunks_of_any_size(
    monkeypatch, largest, num_tokens, options
):
    monkeypatch.setattr(module, "LARGEST_CHUNK", largest)
    hidden_BLD, weight_VD, targets_BL, _ = inputs()
    head = head_of(weight_VD, bias(), options, num_tokens)
    run = jax.jit(lambda *arrays: cross_entropy(*arrays))  # compiled again for each size
    found = run(hidden_BLD, head, targets_BL)
    oracle.assert_close(tuple(found), losses_by_hand(hidden_BLD, head, targets_BL))


def weighted(nats_BL, log_z_BL, factors_BL):
    """A loss with a share of the squared log-sum-exps."""
    return ((nats_BL + 0.1 * log_z_BL**2) * factors_BL).sum()


def gradients(largest, monkeypatch, options, **parts):
    """Of hidden states, weights and bias."""
    monkeypatch.setattr(module, "LARGEST_CHUNK", largest)
    hidden_BLD, weight_VD, targets_BL, factors_BL = inputs()

    def loss(hidden_BLD, weight_VD, bias_V):
        head = head_of(weight_VD, bias_V, options)
        return weighted(*cross_entropy(hidden_BLD, head, targets_BL, **parts), factors_BL)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(hidden_BLD, weight_VD, bias())


def test_gradients_of_a_head_with_all_options_are_those_of_the_formula(monkeypatch):
    _, _, bias_gradient_V = gradients(100, monkeypatch, BIASED)
    hidden_BLD, weight_VD, targets_BL, factors_BL = inputs()
    step_V = np.zeros(VOCAB)
    step_V[3] = 1e-4
    sums = []
    for sign in (1, -1):
        moved_V = np.float64(bias()) + sign * step_V
        head = head_of(weight_VD, moved_V, BIASED)
        losses = losses_by_hand(hidden_BLD, head, targets_BL)
        sums.append(weighted(*losses, np.float64(factors_BL)))
    slope = (sums[0] - sums[1]) / 2e-4
    assert float(bias_gradient_V[3]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("options", [PLAIN, BIASED], ids=["plain", "biased"])
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
def test_gradients_are_those_of_all_logits_at_once(monkeypatch, largest, parts, options):
    expected = gradients(2**23, monkeypatch, options)
    oracle.assert_close(gradients(largest, monkeypatch, options, **parts), expected)
    assert float(jnp.abs(expected[1][-2:]).max()) == 0  # ids that are no token learn nothing


def test_the_gradient_of_the_head_is_summed_over_chunks_in_float32(monkeypatch):
    # Every position adds the same to the gradient: in bfloat16 the sum of 512 chunks would stop
    # growing at 256.
    length = 512
    monkeypatch.setattr(module, "LARGEST_CHUNK", 1)
    hidden_BLD = jnp.ones((1, length, 1), jnp.bfloat16)
    targets_BL = jnp.zeros((1, length), jnp.int32)

    def loss(weight_VD):
        return cross_entropy(hidden_BLD, Head(weight_VD, 2), targets_BL).nats_BL.sum()

    gradient_VD = jax.jit(jax.grad(loss))(jnp.zeros((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(np.float32(gradient_VD)[:, 0], [-length / 2, length / 2])
