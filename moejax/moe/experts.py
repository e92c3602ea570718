"""Feed-forward networks: the dense one and, on rows grouped by expert, the experts'."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.kernels.project import project

initialize = jax.nn.initializers.lecun_normal()
"""Truncated normal of standard deviation 1/sqrt(fan in)."""


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases. Shazeer 2020, equation 6."""

    def __init__(self, d_model: int, d_hidden: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        gate_up_D2F, down_FD = init_feed_forward(rngs.params(), d_model, d_hidden)
        self.gate_up = nnx.Param(gate_up_D2F, axes=("embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_FD, axes=("mlp", "embed"))
        self.dtype = dtype

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the network to each position."""
        gate_up_D2F = self.gate_up[...].astype(self.dtype)
        gate_BLF, up_BLF = (project(x_BLD, gate_up_D2F[:, i]) for i in range(2))
        return project(jax.nn.silu(gate_BLF) * up_BLF, self.down[...].astype(self.dtype))


class Experts(nnx.Module):
    """The weights of E feed-forward networks of width F, stacked."""

    def __init__(self, num_experts: int, d_model: int, d_expert: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        # Every expert has the key of its global id and the initializer of one dense layer: its weights depend neither
        # on the mesh nor on the number of experts.
        key = rngs.params()
        keys_E = jax.vmap(lambda e: jax.random.fold_in(key, e))(jnp.arange(num_experts))
        init = jax.vmap(lambda k: init_feed_forward(k, d_model, d_expert))
        gate_up_ED2F, down_EFD = init(keys_E)
        self.gate_up = nnx.Param(gate_up_ED2F, axes=("experts", "embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_EFD, axes=("experts", "mlp", "embed"))
        self.dtype = dtype

    def weights(self) -> tuple[Float[Array, "E D 2 F"], Float[Array, "E F D"]]:
        """Gate and up projections, and the down projection, in the compute dtype."""
        return self.gate_up[...].astype(self.dtype), self.down[...].astype(self.dtype)


def init_feed_forward(key: jax.Array, d_model: int, d_hidden: int) -> tuple[jax.Array, jax.Array]:
    """Weights of one SwiGLU network: gate and up `[D, 2, F]`, down `[F, D]`."""
    in_key, out_key = jax.random.split(key)
    gate_up_D2F = initialize(in_key, (d_model, 2 * d_hidden)).reshape(d_model, 2, d_hidden)
    return gate_up_D2F, initialize(out_key, (d_hidden, d_model))


def apply_experts(
    x_RD: Float[Array, "R D"],
    gate_up_ED2F: Float[Array, "E D 2 F"],
    down_EFD: Float[Array, "E F D"],
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
) -> Float[Array, "R D"]:
    """SwiGLU of each row by its own expert.

    Args:
      x_RD: rows grouped by expert.
      gate_up_ED2F: gate (index 0) and up (index 1) projections.
      down_EFD: down projections.
      matmul: product of grouped rows with one matrix per expert, `(rows, [E, P, Q]) -> rows`.
    """
    num_experts, d_model, _, d_expert = gate_up_ED2F.shape
    hidden_R2F = matmul(x_RD, gate_up_ED2F.reshape(num_experts, d_model, 2 * d_expert))
    gate_RF, up_RF = hidden_R2F[:, :d_expert], hidden_R2F[:, d_expert:]
    return matmul(jax.nn.silu(gate_RF) * up_RF, down_EFD)
