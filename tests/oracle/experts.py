"""The truth for experts of any kind: every expert computed for every token in a loop, and the
selection as a mask.

Plain `jax.numpy` that can be differentiated, written from the formulas. Parameters are the pure
dict of a layer; the activations exist a second time as formulas of single numbers
(`activation_of_numbers`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from oracle import route_one


def activation_of_numbers(name, gate, up, limit):
    """The hidden unit from one gate and one up value (those without a gate ignore it)."""
    sigmoid = 1 / (1 + math.exp(-gate))
    gaussian = 0.5 * (1 + math.erf(gate / math.sqrt(2)))
    clamped = min(gate, limit)
    return {
        "swiglu": gate * sigmoid * up,
        "geglu": gate * gaussian * up,
        "gelu": up * 0.5 * (1 + math.erf(up / math.sqrt(2))),
        "relu": max(up, 0.0),
        "squared_relu": max(up, 0.0) ** 2,
        "clamped_swiglu": clamped
        / (1 + math.exp(-1.702 * clamped))
        * (max(-limit, min(up, limit)) + 1),
    }[name]


def activation(name, gate, up, limit):
    """The same of arrays."""
    if name == "swiglu":
        return gate / (1 + jnp.exp(-gate)) * up
    if name == "geglu":
        return gate * (1 + jax.scipy.special.erf(gate / math.sqrt(2))) / 2 * up
    if name == "clamped_swiglu":
        clamped = jnp.where(gate < limit, gate, limit)
        bounded = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
        return clamped / (1 + jnp.exp(-1.702 * clamped)) * (bounded + 1)
    if name == "gelu":
        return up * (1 + jax.scipy.special.erf(up / math.sqrt(2))) / 2
    positive = jnp.where(up > 0, up, 0.0)
    return positive**2 if name == "squared_relu" else positive


def network(x, params, config, expert=None):
    """down(activation(x)) of expert `expert`, or of a network that is not stacked."""
    params = params if expert is None else {name: value[expert] for name, value in params.items()}
    hidden = [x @ params["gate_up"][:, i] for i in range(params["gate_up"].shape[1])]
    if config.expert_bias:
        hidden = [h + params["gate_up_bias"][i][None, None] for i, h in enumerate(hidden)]
    y = (
        activation(config.activation, hidden[0], hidden[-1], config.activation_limit)
        @ params["down"]
    )
    return y + params["down_bias"][None, None] if config.expert_bias else y


def choose(x_BLD, mask_BL, params, config):
    """The masks of the K most probable choices, [B, L, choices]; 0 at padding."""
    router_DE = np.asarray(params["router"]["kernel"], np.float64)
    chosen_BLE = np.zeros((*mask_BL.shape, router_DE.shape[1]), np.float32)
    for b, t in np.argwhere(mask_BL):
        _, experts, _ = route_one(
            np.asarray(x_BLD[b, t], np.float64) @ router_DE, config.top_k, config.renormalize
        )
        chosen_BLE[b, t, experts] = 1
    return chosen_BLE


def layer(x_BLD, mask_BL, params, config, chosen_BLE, factors_BLE=1.0):
    """The whole layer of a softmax router: routed, free and shared experts.

    Args:
      x_BLD: inputs.
      mask_BL: False at padding.
      params: of the layer.
      config: its `MoeConfig`.
      chosen_BLE: from `choose`.
      factors_BLE: of expert dropout.
    """
    logits_BLE = x_BLD @ params["router"]["kernel"]
    weights_BLE = chosen_BLE * jnp.exp(logits_BLE) / jnp.exp(logits_BLE).sum(-1, keepdims=True)
    if config.renormalize:
        weights_BLE /= weights_BLE.sum(-1, keepdims=True) + (1 - mask_BL[..., None])
    inner = x_BLD @ params["latent_down"] if config.d_latent else x_BLD
    y = jnp.zeros_like(inner)
    for e in range(config.num_experts):
        weight, factor = weights_BLE[..., e : e + 1], (chosen_BLE * factors_BLE)[..., e : e + 1]
        if config.weight_on == "input":
            y += factor * network(weight * inner, params["experts"], config, e)
        else:
            y += factor * weight * network(inner, params["experts"], config, e)
    y_BLD = y @ params["latent_up"] if config.d_latent else y
    first = config.num_experts + config.num_zero_experts
    for i in range(config.num_identity_experts):
        y_BLD += (weights_BLE * factors_BLE)[..., first + i : first + i + 1] * x_BLD
    first += config.num_identity_experts
    for j in range(config.num_constant_experts):
        y_BLD += (weights_BLE * factors_BLE)[..., first + j : first + j + 1] * params[
            "zero_computation_experts"
        ]["vectors"][j][None, None]
    if config.num_shared_experts:
        shared_BLD = network(x_BLD, params["shared"], config)
        if config.shared_combine == "gated":
            shared_BLD = shared_BLD / (1 + jnp.exp(-x_BLD @ params["shared_gate"]))
        y_BLD = y_BLD + mask_BL[..., None] * shared_BLD
    return y_BLD / 2 if config.shared_combine == "averaged" else y_BLD
