"""Feed-forward networks: the dense one and, on rows grouped by expert, the experts'."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.kernels.matmul import dense
from moejax.kernels.vma import unify_vma
from moejax.sharding import gather_fsdp

initialize = jax.nn.initializers.lecun_normal()
"""Truncated normal of standard deviation 1/sqrt(fan in)."""

GATED = ("swiglu", "geglu", "clamped_swiglu")
"""Activations of two projections, gate and up; the others have up alone."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What kind of feed-forward network: down(activation(x)), with or without biases.

    Attributes:
      activation: "swiglu", silu(gate) * up, and "geglu", gelu(gate) * up (Shazeer 2020, equations 5
        and 6); "gelu", "relu", "squared_relu" of up (So et al. 2021); "clamped_swiglu", g *
        sigmoid(1.702 g) * (u + 1) with g the gate clamped from above and u the up projection
        clamped on both sides (gpt-oss).
      limit: of clamped_swiglu.
      has_bias: whether the projections have biases.
    """

    activation: str = "swiglu"
    limit: float = 7.0
    has_bias: bool = False

    @property
    def num_projections(self) -> int:
        """Returns 2 with a gate, 1 without."""
        return 2 if self.activation in GATED else 1

    def activate(self, hidden: list[jax.Array]) -> jax.Array:
        """Returns the hidden units, from gate and up projections or from up alone."""
        up = hidden[-1]
        if self.activation == "swiglu":
            return jax.nn.silu(hidden[0]) * up
        if self.activation == "geglu":
            return jax.nn.gelu(hidden[0], approximate=False) * up
        if self.activation == "clamped_swiglu":
            gate = jnp.minimum(hidden[0], self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
            return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
        if self.activation == "gelu":
            return jax.nn.gelu(up, approximate=False)
        positive = jax.nn.relu(up)
        if self.activation == "squared_relu":
            return positive**2
        return positive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The weights of E networks in the compute dtype.

    There are P projections in, 2 with a gate (index 0) and 1 without.

    Attributes:
      gate_up_EDPF: projections in.
      down_EFD: projection out.
      gate_up_bias_EPF, down_bias_ED: biases; None without.
      network: what kind they are.
    """

    gate_up_EDPF: Any
    down_EFD: Any
    gate_up_bias_EPF: Any = None
    down_bias_ED: Any = None
    network: Network = dataclasses.field(default=Network(), metadata={"static": True})


class FeedForward(nnx.Module):
    """One network, by default SwiGLU without biases."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        dtype: jnp.dtype,
        network: Network = Network(),
        *,
        rngs: nnx.Rngs,
    ):
        gate_up_DPF, down_FD = init_feed_forward(
            rngs.params(), d_model, d_hidden, network.num_projections
        )
        self.gate_up = nnx.Param(gate_up_DPF, axes=("embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_FD, axes=("mlp", "embed"))
        if network.has_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros(gate_up_DPF.shape[1:]), axes=("gate_up", "mlp"))
            self.down_bias = nnx.Param(jnp.zeros(d_model), axes=("embed",))
        self.network = network
        self.dtype = dtype

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the network to each position."""
        network = self.network
        gate_up_DPF = gather_fsdp(self.gate_up, self.dtype)
        hidden = [dense(x_BLD, gate_up_DPF[:, i]) for i in range(network.num_projections)]
        if network.has_bias:
            bias_PF = self.gate_up_bias[...].astype(self.dtype)
            hidden = [h_BLF + bias_PF[i][None, None] for i, h_BLF in enumerate(hidden)]
        active_BLF = network.activate(hidden)
        down_FD = gather_fsdp(self.down, self.dtype)
        y_BLD = dense(active_BLF, down_FD)
        if network.has_bias:
            bias_D = gather_fsdp(self.down_bias, self.dtype)
            y_BLD = y_BLD + bias_D[None, None]
        return y_BLD


class Experts(nnx.Module):
    """The weights of E feed-forward networks of width F, stacked."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        dtype: jnp.dtype,
        network: Network = Network(),
        *,
        rngs: nnx.Rngs,
    ):
        # Every expert has the key of its global id and the initializer of one dense layer: its
        # weights depend neither on the mesh nor on the number of experts.
        key = rngs.params()
        keys_E = jax.vmap(lambda e: jax.random.fold_in(key, e))(jnp.arange(num_experts))
        init = jax.vmap(lambda k: init_feed_forward(k, d_model, d_expert, network.num_projections))
        gate_up_EDPF, down_EFD = init(keys_E)
        self.gate_up = nnx.Param(gate_up_EDPF, axes=("experts", "embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_EFD, axes=("experts", "mlp", "embed"))
        if network.has_bias:
            bias_EPF = jnp.zeros((num_experts, network.num_projections, d_expert))
            self.gate_up_bias = nnx.Param(bias_EPF, axes=("experts", "gate_up", "mlp"))
            self.down_bias = nnx.Param(jnp.zeros((num_experts, d_model)), axes=("experts", "embed"))
        self.network = network
        self.dtype = dtype

    @property
    def num_slots(self) -> int:
        """Returns how many networks there are: with replicas, more than experts."""
        return self.down.shape[0]

    @property
    def are_placed(self) -> bool:
        """Whether the networks are in the slots of a placement."""
        return "slots" in self.down.axes

    def weights(self) -> ExpertWeights:
        """Returns all of them, in the compute dtype."""
        gate_up_EDPF = self.gate_up[...].astype(self.dtype)
        down_EFD = self.down[...].astype(self.dtype)
        if not self.network.has_bias:
            return ExpertWeights(gate_up_EDPF, down_EFD, network=self.network)
        bias_EPF = self.gate_up_bias[...].astype(self.dtype)
        bias_ED = self.down_bias[...].astype(self.dtype)
        return ExpertWeights(gate_up_EDPF, down_EFD, bias_EPF, bias_ED, self.network)


def init_feed_forward(
    key: jax.Array, d_model: int, d_hidden: int, num_projections: int = 2
) -> tuple[jax.Array, jax.Array]:
    """Draws the weights of one network: P projections in `[D, P, F]`, one out `[F, D]`."""
    in_key, out_key = jax.random.split(key)
    gate_up_DX = initialize(in_key, (d_model, num_projections * d_hidden))
    gate_up_DPF = gate_up_DX.reshape(d_model, -1, d_hidden)
    down_FD = initialize(out_key, (d_hidden, d_model))
    return gate_up_DPF, down_FD


def apply_experts(
    x_RD: Float[Array, "R D"],
    weights: ExpertWeights,
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
    expert_R: Int[Array, "R"],
) -> Float[Array, "R D"]:
    """Applies to each row the network of its own expert.

    Args:
      x_RD: rows grouped by expert.
      weights: of the experts.
      matmul: product of grouped rows with one matrix per expert, `(rows, [E, P, Q]) -> rows`.
      expert_R: the expert of each row, E or more where it is empty; only biases look at it.
    """
    network = weights.network
    num_experts, d_model, num_projections, d_expert = weights.gate_up_EDPF.shape
    gate_up_EDX = weights.gate_up_EDPF.reshape(num_experts, d_model, -1)
    hidden_RX = matmul(x_RD, gate_up_EDX)
    if network.has_bias:
        bias_EX = weights.gate_up_bias_EPF.reshape(num_experts, -1)
        hidden_RX += _bias_of_rows(bias_EX, expert_R)
    starts = range(0, num_projections * d_expert, d_expert)
    hidden = [hidden_RX[:, start : start + d_expert] for start in starts]
    y_RD = matmul(network.activate(hidden), weights.down_EFD)
    if network.has_bias:
        y_RD = y_RD + _bias_of_rows(weights.down_bias_ED, expert_R)
    return y_RD


def _bias_of_rows(bias_EP: jax.Array, expert_R: jax.Array) -> jax.Array:
    """Returns the bias of each row's expert; zeros for empty rows."""
    bias_EP, expert_R = unify_vma(bias_EP, expert_R)
    return bias_EP.at[expert_R].get(mode="fill", fill_value=0, indices_are_sorted=True)
