"""Routing otherwise than as trained, as arrays: they pass through `jit`, and `vmap` stacks them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import ROUTER_RULES, MoeConfig
from moejax.moe.expert_parallel.placement import PlacementError
from moejax.moe.router import UNRANKED


class OverridesError(ValueError):
    """Overrides that a layer cannot follow."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingOverrides:
    """How a pass routes otherwise than the model was trained to.

    None leaves things as trained. The shapes are those of one layer; for a whole model every array
    has a leading axis of its MoE layers. Not for training.

    Attributes:
      is_blocked_E: experts that no token visits, bool: the next in rank take their place. Scores
        and their normalisation over all experts stay as they are, but for `sparse_mixer`, where
        only experts that are left compete. Groups of experts are ranked by those that are left, and
        a token visits further groups where its own have too few: it visits K experts wherever K are
        left.
      is_ablated_E: experts whose output counts as 0, bool; tokens visit them as before.
      active_top_k: experts per token, an int32 scalar, at most `moe.top_k`: the best of each. It
        takes the place of what `schedule.top_k` has set.
      capacity_factor: slots of an expert over their mean number, a float32 scalar; choices beyond
        them are dropped or move, as `moe.overflow` says.
      placement: the slots of each expert, `Replicas`, where `models.place_experts` moved weights.
    """

    is_blocked_E: Any = None
    is_ablated_E: Any = None
    active_top_k: Any = None
    capacity_factor: Any = None
    placement: Any = None

    def of_layers(self, first: int, num: int) -> "RoutingOverrides":
        """Returns those of `num` layers of a model."""
        return jax.tree.map(lambda x_N: x_N[first : first + num], self)


AS_TRAINED = RoutingOverrides()


def split_overrides(
    overrides: RoutingOverrides, nums_of_layers: Sequence[int]
) -> list[RoutingOverrides]:
    """Returns the overrides of each stack of a model.

    Args:
      overrides: with a leading axis of all MoE layers.
      nums_of_layers: how many MoE layers each stack has; 0 where it is dense.

    Raises:
      OverridesError: overrides of another number of layers.
    """
    num_layers = sum(nums_of_layers)
    for path, array in jax.tree.leaves_with_path(overrides):
        if array.shape[:1] != (num_layers,):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise OverridesError(
                f"{name} has shape {array.shape}; its first axis must be the {num_layers} MoE "
                "layers of the model"
            )
    parts = []
    first = 0
    for num in nums_of_layers:
        parts.append(overrides.of_layers(first, num) if num else AS_TRAINED)
        first += num
    return parts


def check_overrides(overrides: RoutingOverrides, config: MoeConfig, *, is_placed: bool) -> None:
    """Checks that a layer can follow its overrides.

    Args:
      overrides: of the layer.
      config: of the layer.
      is_placed: whether its experts are in the slots of a placement.

    Raises:
      OverridesError: an array of another shape, or a router that cannot do it.
      PlacementError: experts in slots and no placement, or the other way round.
    """
    router = config.router
    rules = ROUTER_RULES[router]
    _check_shape("is_blocked_E", overrides.is_blocked_E, (config.num_choices,))
    _check_shape("is_ablated_E", overrides.is_ablated_E, (config.num_choices,))
    _check_shape("active_top_k", overrides.active_top_k, ())
    _check_shape("capacity_factor", overrides.capacity_factor, ())
    if overrides.is_blocked_E is not None and router in UNRANKED:
        raise OverridesError(
            f"moe.router={router} ranks no expert after those that a token visits, "
            f"so none can be blocked; it can with any router but {', '.join(UNRANKED)}"
        )
    if overrides.active_top_k is not None and not rules.can_limit:
        able = [name for name, rule in ROUTER_RULES.items() if rule.can_limit]
        raise OverridesError(
            f"moe.router={router} makes weights by a formula that needs a fixed moe.top_k, so "
            f"active_top_k cannot change it; it can with {', '.join(able)}"
        )
    if overrides.capacity_factor is not None and not rules.takes_capacity:
        raise OverridesError(
            f"moe.router={router}: experts choose, and none can overflow, so capacity_factor means "
            "nothing; leave it out"
        )
    if is_placed and overrides.placement is None:
        raise PlacementError(
            "the experts of this layer are in the slots of a placement; give the overrides that "
            "`place_experts` returned with the model"
        )
    if overrides.placement is not None and not is_placed:
        raise PlacementError(
            "a placement is given, and the experts of this layer are where they were trained; use "
            "the model that `place_experts` returned with it"
        )


def drop_ablated(
    dropout_TK: Float[Array, "T K"] | None,
    experts_TK: Int[Array, "T K"],
    overrides: RoutingOverrides,
) -> Float[Array, "T K"] | None:
    """Returns the factors on the choices' outputs with those of ablated experts at 0.

    Args:
      dropout_TK: the factors of expert dropout; None: all are 1.
      experts_TK: final experts; an id beyond the last is of none.
      overrides: which experts are ablated; none where they do not say.
    """
    if overrides.is_ablated_E is None:
        return dropout_TK
    is_ablated_E = jnp.asarray(overrides.is_ablated_E)
    is_ablated_TK = is_ablated_E.at[experts_TK].get(mode="fill", fill_value=False)
    kept_TK = jnp.ones(experts_TK.shape) if dropout_TK is None else dropout_TK
    return jnp.where(is_ablated_TK, 0.0, kept_TK)


def _check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise OverridesError(f"{name} has shape {array.shape}; it must be {shape}")
