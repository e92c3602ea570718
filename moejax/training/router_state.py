"""The state of routers, updated once per step from sums over the global batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config, Knobs, MoeConfig
from moejax.moe.balancing.state import update_bias, update_idle_steps, update_quantiles
from moejax.moe.balancing.stats import RoutingStats
from moejax.moe.router.modules import RouterState
from moejax.training.schedules import factor


def update_router_state(
    state: nnx.State, routing: Sequence[RoutingStats], config: Config, knobs: Knobs
) -> nnx.State:
    """Returns the state after a step: selection biases, and how long experts have been idle.

    Args:
      state: arrays with a leading axis of the layers of a group, by path; groups in the order of
        the model.
      routing: sums over the global batch of each group of MoE layers.
      config: of the training run.
      knobs: for the step of the bias.
    """
    updated = dict(nnx.to_flat_state(state))
    for (_, group), stats, moe in zip(_by_group(state), routing, config.moe_groups, strict=True):
        for name, (path, variable) in group.items():
            value = _update(name, variable[...], stats, moe, knobs)
            updated[path] = variable.replace(value)
    return nnx.from_flat_state(updated.items())


def schedule_router_state(state: nnx.State, config: Config, step: jax.Array | int) -> nnx.State:
    """Returns the state with what schedules set at a step: how many experts a token may visit."""
    scheduled = dict(nnx.to_flat_state(state))
    for (_, group), moe in zip(_by_group(state), config.moe_groups, strict=True):
        for name, (path, variable) in group.items():
            value = variable[...]
            if name == "active_top_k":
                value = jnp.full_like(value, active_top_k_at(config, moe.top_k, step))
            scheduled[path] = variable.replace(value)
    return nnx.from_flat_state(scheduled.items())


def active_top_k_at(config: Config, top_k: int, step: jax.Array | int) -> jax.Array:
    """Returns the experts per token at a step, int32: `active_top_k_of`, traced."""
    wanted = top_k * factor(config, "top_k", jnp.int32(step))
    rounded = jnp.floor(wanted + 0.5)
    return jnp.maximum(1, rounded).astype(jnp.int32)


def _update(
    name: str, value: jax.Array, stats: RoutingStats, moe: MoeConfig, knobs: Knobs
) -> jax.Array:
    if name == "idle_steps":
        return update_idle_steps(value, stats.assignments_E)
    if name == "selection_bias" and stats.quantile_margins_TE is not None:
        return update_quantiles(stats.quantile_margins_TE, stats.num_tokens, moe.top_k)
    if name == "selection_bias":
        return update_bias(
            value, stats.assignments_E, knobs.bias_rate, is_centered=moe.bias_centered
        )
    return value  # a hash router's table


def state_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """Returns the state by layer and expert, `[N, E]`.

    Returns:
      `idle_steps`, int32, and `bias`, float32, NaN in layers without one. There is no `bias` if no
      layer has one.
    """
    idle_steps = []
    biases = []
    has_bias = False
    for _, group in _by_group(state):
        _, idle_variable = group["idle_steps"]
        idle_NE = idle_variable[...]
        bias_NE = jnp.full(idle_NE.shape, jnp.float32(jnp.nan))
        if "selection_bias" in group:
            _, bias_variable = group["selection_bias"]
            bias_NE = bias_variable[...]
            has_bias = True
        idle_steps.append(idle_NE)
        biases.append(bias_NE)
    arrays = {"idle_steps": jnp.concatenate(idle_steps)}
    if has_bias:
        arrays["bias"] = jnp.concatenate(biases)
    return arrays


def state_metrics(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns metrics of `state_arrays`.

    The longest that any expert has been idle, in steps, and the mean over layers of the bias's
    range.
    """
    most_idle = arrays["idle_steps"].max()
    metrics = {"moe/idle_steps": most_idle.astype(jnp.float32)}
    if "bias" in arrays:
        bias_NE = arrays["bias"]
        range_N = bias_NE.max(axis=1) - bias_NE.min(axis=1)
        metrics["moe/bias_range"] = jnp.nanmean(range_N)
    return metrics


def _by_group(state: nnx.State):
    """Returns `(place, {name: (path, variable)})` of each group of MoE layers, in order.

    Constants of layers, such as the window of attention, are in the state, too, and are left out.
    """
    groups: dict[tuple, dict] = {}
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, RouterState):
            continue
        *place, name = path
        group = groups.setdefault(tuple(place), {})
        group[name] = (path, variable)
    return sorted(groups.items())
