"""The optimizer of a run: clipping, a rule that makes updates, weight decay, learning rates."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config import OptimizerConfig, ParameterGroup, Transfer, read_groups
from moejax.training.optimizers.matrices import axes_of, map_params
from moejax.training.optimizers.muon import keep_norm
from moejax.training.optimizers.plans import NO_TRANSFER, Plan, plans_of
from moejax.training.optimizers.rules import RULES

Plans = Mapping[str, Plan]
"""By the path of the parameter."""


def make_optimizer(
    config: OptimizerConfig, params: nnx.State, transfer: Transfer = NO_TRANSFER
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer of a run.

    `update` takes the learning rate of the step as a keyword, and returns what
    `optax.apply_updates` adds to the parameters.

    Args:
      config: the optimizer's leaves.
      params: parameters with their logical axes.
      transfer: factors of a model over the one whose learning rate it has.

    Raises:
      ConfigError: a group of `optimizer.groups` that no parameter is in.
    """
    plans = plans_of(config, params, transfer)
    rule = RULES[config.name](config, params)
    return optax.chain(
        _clip(config, plans),
        _keep_in(jnp.dtype(config.moments_dtype), rule),
        _add_decay(plans),
        _scale_by_given_rate(plans),
    )


def _clip(config: OptimizerConfig, plans: Plans) -> optax.GradientTransformation:
    """Clips groups by their own norms, then everything by the global one."""
    clips = []
    for group in read_groups(config.groups):
        if group.clip_norm:
            clips.append(_clip_group(group, plans))
    if config.clip_norm:
        clips.append(optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*clips) if clips else optax.identity()


def _clip_group(group: ParameterGroup, plans: Plans) -> optax.GradientTransformation:
    def is_in_group(gradients: nnx.State) -> nnx.State:
        return map_params(lambda path, _: plans[path].group == group, gradients)

    return optax.masked(optax.clip_by_global_norm(group.clip_norm), is_in_group)


def _keep_in(dtype: jnp.dtype, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the rule with moments that are kept in a type, and computed in float32."""
    if dtype == jnp.float32:
        return rule

    def cast(state: optax.OptState, dtype: Any) -> optax.OptState:
        def cast_moment(array: jax.Array) -> jax.Array:
            return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

        return jax.tree.map(cast_moment, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(rule.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = rule.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _add_decay(plans: Plans) -> optax.GradientTransformation:
    """Adds the weights of matrices, times the decay of each."""

    def add_decay(updates: nnx.State, params: nnx.State) -> nnx.State:
        def with_decay(path: str, update: nnx.Variable, param: nnx.Variable) -> jax.Array:
            decay = plans[path].weight_decay
            return update[...] + decay * param[...] if decay else update[...]

        return map_params(with_decay, updates, params)

    return optax.stateless(add_decay)


def _scale_by_given_rate(plans: Plans) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the `learning_rate` with which `update` is called.

    In `optax.scale_by_learning_rate` the rate is fixed or follows a count of its own. Here it is
    traced: a knob scales it, and it follows the step count of the run, which also counts skipped
    steps. The state holds no array.
    """

    def update(
        updates: nnx.State,
        state: optax.OptState,
        params: nnx.State,
        *,
        learning_rate: jax.Array,
        **others: Any,
    ) -> tuple[nnx.State, optax.OptState]:
        del others

        def scaled(path: str, update: nnx.Variable, param: nnx.Variable) -> jax.Array:
            plan = plans[path]
            rate = learning_rate if plan.rate == 1 else learning_rate * plan.rate
            if plan.keeps_norm:
                return keep_norm(param[...], update[...], rate, axes_of(update.axes))
            return update[...] * -rate

        return map_params(scaled, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
