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

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
"""Product of grouped rows with one matrix per expert, `(rows, [E, P, Q]) -> rows`."""

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
        if self.activation in GATED:
            gate, up = hidden
            return self._gated(gate, up)
        (up,) = hidden
        if self.activation == "gelu":
            return jax.nn.gelu(up, approximate=False)
        positive = jax.nn.relu(up)
        if self.activation == "squared_relu":
            return positive**2
        return positive

    def _gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns the hidden units from gate and up projections."""
        if self.activation == "swiglu":
            return jax.nn.silu(gate) * up
        if self.activation == "geglu":
            return jax.nn.gelu(gate, approximate=False) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        # 1.702 makes x * sigmoid(1.702 x) nearly gelu(x).
        opened = jax.nn.sigmoid(1.702 * gate)
        active = gate * opened
        return active * (up + 1)


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
        num_projections = network.num_projections
        gate_up_DPF, down_FD = init_feed_forward(rngs.params(), d_model, d_hidden, num_projections)
        self.gate_up = nnx.Param(gate_up_DPF, axes=("embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_FD, axes=("mlp", "embed"))
        if network.has_bias:
            bias_PF = jnp.zeros((num_projections, d_hidden))
            bias_D = jnp.zeros(d_model)
            self.gate_up_bias = nnx.Param(bias_PF, axes=("gate_up", "mlp"))
            self.down_bias = nnx.Param(bias_D, axes=("embed",))
        self.network = network
        self.dtype = dtype

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the network to each position."""
        hidden = self._project_in(x_BLD)
        if self.network.has_bias:
            hidden = self._add_bias(hidden)
        active_BLF = self.network.activate(hidden)
        down_FD = gather_fsdp(self.down, self.dtype)
        y_BLD = dense(active_BLF, down_FD)
        if self.network.has_bias:
            bias_D = gather_fsdp(self.down_bias, self.dtype)
            y_BLD = y_BLD + bias_D[None, None]
        return y_BLD

    def _project_in(self, x_BLD: jax.Array) -> list[jax.Array]:
        """Returns gate and up projections, or up alone."""
        gate_up_DPF = gather_fsdp(self.gate_up, self.dtype)
        hidden = []
        for i in range(self.network.num_projections):
            weight_DF = gate_up_DPF[:, i]
            hidden.append(dense(x_BLD, weight_DF))
        return hidden

    def _add_bias(self, hidden: list[jax.Array]) -> list[jax.Array]:
        """Adds the bias of each projection."""
        bias_PF = self.gate_up_bias[...].astype(self.dtype)
        biased = []
        for i, hidden_BLF in enumerate(hidden):
            bias_F = bias_PF[i]
            biased.append(hidden_BLF + bias_F[None, None])
        return biased


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
        num_projections = network.num_projections

        def key_of(expert):
            return jax.random.fold_in(key, expert)

        def init_expert(key):
            return init_feed_forward(key, d_model, d_expert, num_projections)

        expert_E = jnp.arange(num_experts)
        keys_E = jax.vmap(key_of)(expert_E)
        gate_up_EDPF, down_EFD = jax.vmap(init_expert)(keys_E)
        self.gate_up = nnx.Param(gate_up_EDPF, axes=("experts", "embed", "gate_up", "mlp"))
        self.down = nnx.Param(down_EFD, axes=("experts", "mlp", "embed"))
        if network.has_bias:
            bias_EPF = jnp.zeros((num_experts, num_projections, d_expert))
            bias_ED = jnp.zeros((num_experts, d_model))
            self.gate_up_bias = nnx.Param(bias_EPF, axes=("experts", "gate_up", "mlp"))
            self.down_bias = nnx.Param(bias_ED, axes=("experts", "embed"))
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
        weights = ExpertWeights(
            gate_up_EDPF=self._cast(self.gate_up),
            down_EFD=self._cast(self.down),
            network=self.network,
        )
        if not self.network.has_bias:
            return weights
        return dataclasses.replace(
            weights,
            gate_up_bias_EPF=self._cast(self.gate_up_bias),
            down_bias_ED=self._cast(self.down_bias),
        )

    def _cast(self, parameter: nnx.Param) -> jax.Array:
        """Returns a parameter in the compute dtype."""
        return parameter[...].astype(self.dtype)


def init_feed_forward(
    key: jax.Array,
    d_model: int,
    d_hidden: int,
    num_projections: int = 2,
) -> tuple[jax.Array, jax.Array]:
    """Draws the weights of one network: P projections in `[D, P, F]`, one out `[F, D]`."""
    in_key, out_key = jax.random.split(key)
    num_columns = num_projections * d_hidden
    gate_up_DX = initialize(in_key, (d_model, num_columns))
    gate_up_DPF = gate_up_DX.reshape(d_model, -1, d_hidden)
    down_FD = initialize(out_key, (d_hidden, d_model))
    return gate_up_DPF, down_FD


def apply_experts(
    x_RD: Float[Array, "R D"],
    weights: ExpertWeights,
    matmul: Matmul,
    expert_R: Int[Array, "R"],
) -> Float[Array, "R D"]:
    """Applies to each row the network of its own expert.

    Args:
      x_RD: rows grouped by expert.
      weights: of the experts.
      matmul: of the rows with the experts' matrices.
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
    active_RF = network.activate(hidden)
    y_RD = matmul(active_RF, weights.down_EFD)
    if network.has_bias:
        y_RD = y_RD + _bias_of_rows(weights.down_bias_ED, expert_R)
    return y_RD


def _bias_of_rows(bias_EP: jax.Array, expert_R: jax.Array) -> jax.Array:
    """Returns the bias of each row's expert; zeros for empty rows."""
    bias_EP, expert_R = unify_vma(bias_EP, expert_R)
    return bias_EP.at[expert_R].get(mode="fill", fill_value=0, indices_are_sorted=True)
