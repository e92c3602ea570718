"""The kinds of norms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from moejax.nn.norms import NORMS, make_norm

EPSILON = 1e-4
SCALE_D = np.arange(1.0, 5.0)
BIAS_D = np.array([0.5, -1.0, 0.0, 2.0])


def by_hand(kind, x_BD):
    """Returns the normalised rows in float64, with `SCALE_D` as stored scale and `BIAS_D`."""
    rows = []
    for x_D in np.asarray(x_BD, np.float64):
        if kind.startswith("layer"):
            x_D = x_D - sum(x_D) / len(x_D)
        root = np.sqrt(sum(x_D**2) / len(x_D) + EPSILON)
        scale_D = 1 + SCALE_D if kind == "zero_centered_rms" else SCALE_D
        bias_D = BIAS_D if kind == "layer" else 0
        rows.append(x_D / root * scale_D + bias_D)
    return np.stack(rows)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_that_of_its_formula(kind):
    norm = make_norm(kind, 4, EPSILON)
    norm.scale[...] = jnp.float32(SCALE_D)
    if kind == "layer":
        norm.bias[...] = jnp.float32(BIAS_D)
    num_vectors = len(jax.tree.leaves(nnx.state(norm, nnx.Param)))
    assert num_vectors == (2 if kind == "layer" else 1)
    x_BD = np.array([[3.0, -4.0, 0.0, 12.0], [1e-3, 0, 0, 0]])
    oracle.assert_close(norm(jnp.float32(x_BD)), by_hand(kind, x_BD))


@pytest.mark.parametrize("kind", NORMS)
def test_a_new_norm_only_normalises_and_rounds_once_in_bfloat16(kind):
    low_BD = jax.random.normal(jax.random.key(0), (4, 301), jnp.bfloat16)
    wide_BD = np.asarray(low_BD, np.float64)
    if kind.startswith("layer"):
        wide_BD -= wide_BD.mean(-1, keepdims=True)
    exact_BD = wide_BD / np.sqrt((wide_BD**2).mean(-1, keepdims=True) + EPSILON)
    y_BD = make_norm(kind, 301, EPSILON)(low_BD)
    assert y_BD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_BD, jnp.asarray(exact_BD, jnp.bfloat16))
