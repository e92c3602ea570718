"""Modules that turn the residual stream into router logits, in float32 for any compute dtype."""

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
"""Least standard deviation of learned noise.

Source: Shazeer et al. 2017, equation 4 with the constant of their code.
"""


class RouterState(nnx.Variable):
    """What a router carries besides parameters.

    It has no gradient and no optimizer; it is saved, restored, and updated once per step.
    """


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
        kernel_DE = init(rngs.params(), (d_model, config.num_choices))
        self.kernel = nnx.Param(kernel_DE, axes=("embed", "router"))
        if config.router_bias:
            self.bias = nnx.Param(jnp.zeros(config.num_choices), axes=("router",))
        self.has_bias = config.router_bias

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns the logits of each expert for each token."""
        logits_BLE = _dense_float32(x_BLD, gather_fsdp(self.kernel))
        if self.has_bias:
            logits_BLE = logits_BLE + self.bias[...][None, None]
        return Logits(logits_BLE)


class NoisyRouter(nnx.Module):
    """A linear map to logits and one to the size of their noise.

    Both are 0 at first, so that routing starts as pure noise. With `router_noise="fixed"` the size
    is 1/E, and the linear map starts as others do.

    Source: Shazeer et al. 2017, equation 4 and appendix A; Riquelme et al. 2021 (fixed).
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        self.linear = Router(config, d_model, rngs=rngs)
        self.is_learned = config.router_noise == "learned"
        if self.is_learned:
            self.linear.kernel[...] = jnp.zeros_like(self.linear.kernel[...])
            noise_kernel_DE = jnp.zeros((d_model, config.num_choices))
            self.noise_kernel = nnx.Param(noise_kernel_DE, axes=("embed", "router"))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns the logits, and the standard deviation of the noise on each."""
        logits_BLE = self.linear(x_BLD).logits_BLE
        if not self.is_learned:
            num_choices = logits_BLE.shape[-1]
            return Logits(logits_BLE, jnp.full_like(logits_BLE, 1 / num_choices))
        raw_scale_BLE = _dense_float32(x_BLD, gather_fsdp(self.noise_kernel))
        noise_scale_BLE = jax.nn.softplus(raw_scale_BLE) + MIN_NOISE
        return Logits(logits_BLE, noise_scale_BLE)


class CosineRouter(nnx.Module):
    """Cosine between a projection of the token and a vector of each expert, over a temperature.

    The projection has few dimensions. The temperature is learned, from 0.5 on and never below 0.01.

    Source: Chi et al. 2022 (X-MoE), section 3.
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        width, num_choices = config.d_router, config.num_choices
        init = jax.nn.initializers.lecun_normal()
        down_DR = init(rngs.params(), (d_model, width))
        self.down = nnx.Param(down_DR, axes=("embed", "router"))
        vectors_ER = jax.random.normal(rngs.params(), (num_choices, width))
        self.vectors = nnx.Param(vectors_ER, axes=("router", "router"))
        log_scale = jnp.log(jnp.full(1, 2.0))  # a temperature of 0.5
        self.log_scale = nnx.Param(log_scale, axes=("router",))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns logits between -1 and 1 over the temperature."""
        projected_BLR = _dense_float32(x_BLD, gather_fsdp(self.down))
        x_BLR = _unit(projected_BLR, axis=-1)
        log_scale = jnp.minimum(self.log_scale[...], jnp.log(100.0))
        scale = jnp.exp(log_scale)
        vectors_ER = _unit(self.vectors[...], axis=-1)
        cosine_BLE = _dense_float32(x_BLR, vectors_ER.T)
        return Logits(cosine_BLE * scale[None, None])


class HierarchicalRouter(nnx.Module):
    """A noisy router over groups of experts, and one over the experts."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        over_experts = dataclasses.replace(config, router_noise="learned")
        over_groups = dataclasses.replace(over_experts, num_experts=config.num_groups)
        self.experts = NoisyRouter(over_experts, d_model, rngs=rngs)
        self.groups = NoisyRouter(over_groups, d_model, rngs=rngs)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns the logits and the noise of both levels."""
        experts = self.experts(x_BLD)
        groups = self.groups(x_BLD)
        return Logits(
            logits_BLE=experts.logits_BLE,
            noise_scale_BLE=experts.noise_scale_BLE,
            group_logits_BLG=groups.logits_BLE,
            group_noise_scale_BLG=groups.noise_scale_BLE,
        )


class NoLogits(nnx.Module):
    """For routers that do not look at the token: logits of 0."""

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        del d_model, rngs
        self.num_choices = config.num_choices

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns zeros."""
        batch, length, _ = x_BLD.shape
        return Logits(jnp.zeros((batch, length, self.num_choices)))


class SoftRouter(nnx.Module):
    """Scaled cosine between tokens and slots.

    Source: Puigcerver et al. 2023, section 2.3: x and the slots' vectors are normalised, the
    scale is learned.
    """

    def __init__(self, config: MoeConfig, d_model: int, *, rngs: nnx.Rngs):
        shape = (d_model, config.num_experts, config.slots_per_expert)
        init = jax.nn.initializers.normal(d_model**-0.5)
        slots_DEP = init(rngs.params(), shape)
        self.slots = nnx.Param(slots_DEP, axes=("embed", "router", "router"))
        scale_1 = jnp.ones(1)
        self.scale = nnx.Param(scale_1, axes=("router",))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Logits:
        """Returns the logits of tokens and slots, `[B, L, E * P]`."""
        slots_DEP = gather_fsdp(self.slots)
        slots_DS = slots_DEP.reshape(x_BLD.shape[-1], -1)
        unit_DS = _unit(slots_DS, axis=0)
        scaled_DS = unit_DS * self.scale[...][None]
        unit_BLD = _unit(x_BLD, axis=-1)
        return Logits(_dense_float32(unit_BLD, scaled_DS))


def make_router(
    config: MoeConfig, d_model: int, *, rngs: nnx.Rngs
) -> Callable[[jax.Array], Logits]:
    """Returns the module that makes the logits of the configured router."""
    if config.score == "uniform":
        return NoLogits(config, d_model, rngs=rngs)
    special = {
        "noisy_topk": NoisyRouter,
        "cosine": CosineRouter,
        "hierarchical": HierarchicalRouter,
        "soft": SoftRouter,
    }
    return special.get(config.router, Router)(config, d_model, rngs=rngs)


def _dense_float32(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies in float32 on every platform.

    By default TPUs would round to bfloat16, and GPUs to TF32, before multiplying.
    """
    return dense(x, weight, precision="highest")


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x` over its length; 0 stays 0, with gradient 0."""
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    is_positive = square > 0
    # A value of 1 where there is nothing to divide by, so that the gradient is not 0 times inf.
    inverse_length = jax.lax.rsqrt(jnp.where(is_positive, square, 1.0))
    return x * jnp.where(is_positive, inverse_length, 0.0)
