"""Experts that cost no FLOPs: the router may choose them as it chooses the others.

Their ids follow those of the experts with weights: first zero experts, whose output is 0, then
identity experts, whose output is the token, then constant ones, whose output is a learned vector.
They need no row, no slot and no all-to-all traffic.

Source: Jin et al. 2024 (MoE++, section 3.1; its constant experts also mix in the token);
LongCat-Flash 2025 (identity experts).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import MoeConfig
from moejax.sharding import gather_fsdp


class ZeroComputationExperts(nnx.Module):
    """Zero, identity and constant experts of one layer."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        num_constant = config.num_constant_experts
        self.first_identity = config.num_experts + config.num_zero_experts
        self.first_constant = self.first_identity + config.num_identity_experts
        self.num_constant = num_constant
        if num_constant:
            key = rngs.params()
            normal_JD = jax.random.normal(key, (num_constant, d_model))
            vectors_JD = normal_JD * d_model**-0.5
            self.vectors = nnx.Param(vectors_JD, axes=("router", "embed"))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        experts_BLK: Int[Array, "B L K"],
        weights_BLK: Float[Array, "B L K"],
    ) -> Float[Array, "B L D"]:
        """Returns the weighted sum of their outputs, in float32.

        Ids of other experts, and the id of none, add nothing.
        """
        is_from_identity_BLK = experts_BLK >= self.first_identity
        is_to_constant_BLK = experts_BLK < self.first_constant
        is_identity_BLK = is_from_identity_BLK & is_to_constant_BLK
        identity_weights_BLK = jnp.where(is_identity_BLK, weights_BLK, 0.0)
        identity_BL1 = identity_weights_BLK.sum(axis=-1, keepdims=True)
        y_BLD = identity_BL1 * x_BLD.astype(jnp.float32)
        if self.num_constant:
            y_BLD += self._constant_output(experts_BLK, weights_BLK, x_BLD.dtype)
        return y_BLD

    def _constant_output(
        self,
        experts_BLK: jax.Array,
        weights_BLK: jax.Array,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Returns the weighted sum of the constant experts' vectors, rounded to `dtype`."""
        # Ids that are not of constant experts have a one-hot vector of zeros.
        constant_id_BLK = experts_BLK - self.first_constant
        constant_BLKJ = jax.nn.one_hot(constant_id_BLK, self.num_constant)
        weights_BLJ = jnp.einsum(
            "BLKJ,BLK->BLJ",
            constant_BLKJ,
            weights_BLK,
            precision="highest",
        )
        vectors_JD = gather_fsdp(self.vectors, dtype)
        vectors_JD = vectors_JD.astype(jnp.float32)
        return jnp.einsum(
            "BLJ,JD->BLD",
            weights_BLJ,
            vectors_JD,
            precision="highest",
        )
