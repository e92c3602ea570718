"""Modules that turn the residual stream into router logits, in float32 whatever the compute dtype."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import MoeConfig
from moejax.kernels.matmul import dense
from moejax.sharding import gather_fsdp

MIN_NOISE = 1e-2
"""Least standard deviation of learned noise. Shazeer et al. 2017, equation 4 with the constant of their code."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """What the experts' scores are made of; see `RouterInputs`."""

    logits_BLE: jax.Array
    noise_scale_BLE: jax.Array | None = None
    group_logits_BLG: jax.Array | None = None
    group_noise_scale_BLG: jax.Array | None = None


class Router(nnx.Module):
    """A linear map to expert logits, optionally with a bias (gpt-oss)."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        # A tenth of the usual variance keeps early routing close to uniform (Fedus et al. 2021,
        # section 2.4).
        init = jax.nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(
            init(rngs.params(), (d_model, config.num_choices)), axes=("embed", "router")
        )
        if config.router_bias:
            self.bias = nnx.Param(jnp.zeros(config.num_choices), axes=("router",))
        self.has_bias = config.router_bias

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Logits of each expert for each token."""
        logits_BLE = _exact(x_BLD, gather_fsdp(self.kernel))
        return Logits(logits_BLE + self.bias[...][None, None] if self.has_bias else logits_BLE)


class NoisyRouter(nnx.Module):
    """A linear map to logits and one to the size of their noise, both 0 at first: routing starts as pure noise.

    With `router_noise="fixed"` the size is 1/E, and the linear map starts as others do.

    Source: Shazeer et al. 2017, equation 4 and appendix A; Riquelme et al. 2021 (fixed).
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        self.linear = Router(config, d_model, rngs=rngs)
        self.is_learned = config.router_noise == "learned"
        if self.is_learned:
            self.linear.kernel[...] = jnp.zeros_like(self.linear.kernel[...])
            self.noise_kernel = nnx.Param(
                jnp.zeros((d_model, config.num_choices)), axes=("embed", "router")
            )

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Logits, and the standard deviation of the noise on each."""
        logits_BLE = self.linear(x_BLD).logits_BLE
        if not self.is_learned:
            return Logits(logits_BLE, jnp.full_like(logits_BLE, 1 / logits_BLE.shape[-1]))
        return Logits(
            logits_BLE, jax.nn.softplus(_exact(x_BLD, gather_fsdp(self.noise_kernel))) + MIN_NOISE
        )


class CosineRouter(nnx.Module):
    """Cosine between a low-dimensional projection of the token and a vector of each expert, over a temperature.

    The temperature is learned, from 0.5 on and never below 0.01.

    Source: Chi et al. 2022 (X-MoE), section 3.
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal()
        self.down = nnx.Param(
            init(rngs.params(), (d_model, config.d_router)), axes=("embed", "router")
        )
        vectors_ER = jax.random.normal(rngs.params(), (config.num_choices, config.d_router))
        self.vectors = nnx.Param(vectors_ER, axes=("router", "router"))
        self.log_scale = nnx.Param(jnp.log(jnp.full(1, 2.0)), axes=("router",))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Logits between -1 and 1 over the temperature."""
        x_BLR = _unit(_exact(x_BLD, gather_fsdp(self.down)), axis=-1)
        scale = jnp.exp(jnp.minimum(self.log_scale[...], jnp.log(100.0)))
        return Logits(_exact(x_BLR, _unit(self.vectors[...], axis=-1).T) * scale[None, None])


class HierarchicalRouter(nnx.Module):
    """A noisy router over groups of experts, and one over the experts."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        learned = dataclasses.replace(config, router_noise="learned")
        self.experts = NoisyRouter(learned, d_model, rngs=rngs)
        self.groups = NoisyRouter(
            dataclasses.replace(learned, num_experts=config.num_groups), d_model, rngs=rngs
        )

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Logits and noise of both levels."""
        experts, groups = self.experts(x_BLD), self.groups(x_BLD)
        return Logits(
            experts.logits_BLE, experts.noise_scale_BLE, groups.logits_BLE, groups.noise_scale_BLE
        )


class NoLogits(nnx.Module):
    """For routers that do not look at the token: logits of 0."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        del d_model, rngs
        self.num_choices = config.num_choices

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Zeros."""
        return Logits(jnp.zeros((*x_BLD.shape[:2], self.num_choices)))


class SoftRouter(nnx.Module):
    """Scaled cosine between tokens and slots.

    Source: Puigcerver et al. 2023, section 2.3: x and the slots' vectors are normalised, the
    scale is learned.
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        shape = (d_model, config.num_experts, config.slots_per_expert)
        slots_DEP = jax.nn.initializers.normal(d_model**-0.5)(rngs.params(), shape)
        self.slots = nnx.Param(slots_DEP, axes=("embed", "router", "router"))
        self.scale = nnx.Param(jnp.ones(1), axes=("router",))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Logits of tokens and slots, `[B, L, E * P]`."""
        slots_DS = gather_fsdp(self.slots).reshape(x_BLD.shape[-1], -1)
        scaled_DS = _unit(slots_DS, axis=0) * self.scale[...][None]
        return Logits(_exact(_unit(x_BLD, axis=-1), scaled_DS))


def make_router(
    config: MoeConfig, d_model: int, *, rngs: nnx.Rngs
) -> Callable[[jax.Array], Logits]:
    """The module that makes the logits of the configured router."""
    if config.score == "uniform":
        return NoLogits(config, d_model, rngs=rngs)
    special = {
        "noisy_topk": NoisyRouter,
        "cosine": CosineRouter,
        "hierarchical": HierarchicalRouter,
        "soft": SoftRouter,
    }
    return special.get(config.router, Router)(config, d_model, rngs=rngs)


def _exact(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product in float32 on every platform: TPUs would round to bfloat16, and GPUs to TF32, before multiplying."""
    return dense(x, weight, precision="highest")


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """`x` over its length; 0 stays 0, with gradient 0."""
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
