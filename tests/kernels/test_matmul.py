"""Dense products over the last axes."""

import jax
import jax.numpy as jnp
import numpy as np

import oracle
from moejax.kernels.matmul import dense


def test_a_projection_is_the_contraction_of_the_last_with_the_first_axes():
    rng = np.random.default_rng(0)
    x_BLD, weight_DHA = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 5, 6))
    y_BLHA = dense(jnp.float32(x_BLD), jnp.float32(weight_DHA))
    oracle.assert_close(y_BLHA, np.einsum("BLD,DHA->BLHA", x_BLD, weight_DHA))
    back = rng.normal(size=(5, 6, 4))
    y_BLD = dense(y_BLHA, jnp.float32(back), num_contracted=2)
    oracle.assert_close(y_BLD, np.einsum("BLHA,HAD->BLD", np.asarray(y_BLHA, np.float64), back))


def test_a_projection_can_be_accumulated_in_a_wider_dtype():
    x_BD, w_DF = jnp.ones((1, 1001), jnp.bfloat16), jnp.ones((1001, 1), jnp.bfloat16)
    y_BF = dense(x_BD, w_DF, out_dtype=jnp.float32)
    assert y_BF.dtype == jnp.float32 and float(y_BF[0, 0]) == 1001  # in bfloat16 it would be 1000
    assert dense(x_BD, w_DF).dtype == jnp.bfloat16


def test_the_gradient_of_a_projection_is_that_of_the_contraction():
    x_BLD, w_DF = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(20.0).reshape(4, 5)
    gradients = jax.grad(lambda x, w: jnp.sum(dense(x, w) ** 2), argnums=(0, 1))(x_BLD, w_DF)
    y_BLF = np.einsum("BLD,DF->BLF", x_BLD, w_DF)
    expected = np.einsum("BLF,DF->BLD", 2 * y_BLF, w_DF), np.einsum("BLF,BLD->DF", 2 * y_BLF, x_BLD)
    oracle.assert_close(gradients, expected)
