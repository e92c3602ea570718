"""Placement of experts: a map from slots on devices to experts, chosen from measured load.

Devices have equal numbers of slots, one device after another. The identity placement has expert e
in slot e; replicas of the experts with most load fill spare slots. Nothing but the map changes:
outputs are the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

EVEN = 0.005
"""Differences of `imbalance` up to this do not count: measured load predicts no more closely."""


class PlacementError(ValueError):
    """A placement that is not possible."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicas:
    """The slots of each expert of a layer; with a leading axis of layers for several.

    Attributes:
      slots_EM: the slots of its replicas, at most M, int32; repeated where it has fewer.
      num_E: how many replicas it has, int32.
    """

    slots_EM: Any
    num_E: Any

    @classmethod
    def from_placement(cls, experts_NP: Int[np.ndarray, "N P"], num_experts: int) -> "Replicas":
        """Finds the slots of each expert of N layers from the expert in each slot.

        Raises:
          PlacementError: an expert has no slot.
        """
        expert_E = np.arange(num_experts)
        is_expert_NPE = experts_NP[:, :, None] == expert_E
        num_NE = is_expert_NPE.sum(axis=1)
        if num_NE.min() < 1 or num_NE.sum() != experts_NP.size:
            raise PlacementError(
                f"every one of {num_experts} experts, and no other, must have a slot in every layer"
            )
        most = num_NE.max()
        slots_NEM = np.zeros((*num_NE.shape, most), np.int32)
        for layer, expert in np.ndindex(num_NE.shape):
            is_expert_P = experts_NP[layer] == expert
            slots = np.flatnonzero(is_expert_P)
            slots_NEM[layer, expert] = np.resize(slots, most)
        return cls(slots_NEM, num_NE.astype(np.int32))

    def slots_of(self, experts_BLK: Int[Array, "B L K"], num_slots: int) -> Int[Array, "B L K"]:
        """Returns the slots of chosen experts of one layer.

        Tokens take turns among the replicas of an expert, by row and position in the row. What is
        no expert has no slot: `num_slots`.
        """
        slots_EM, num_E = jnp.asarray(self.slots_EM), jnp.asarray(self.num_E)
        num_experts = num_E.shape[0]
        expert_BLK = jnp.minimum(experts_BLK, num_experts - 1)
        row_BL, position_BL = jnp.indices(experts_BLK.shape[:2])
        turn_BL1 = (row_BL + position_BL)[:, :, None]
        replica_BLK = turn_BL1 % num_E[expert_BLK]
        slot_BLK = slots_EM[expert_BLK, replica_BLK]
        is_expert_BLK = experts_BLK < num_experts
        return jnp.where(is_expert_BLK, slot_BLK, num_slots)


def identity_placement(num_layers: int, num_experts: int) -> Int[np.ndarray, "N E"]:
    """Returns the placement with expert e in slot e."""
    expert_E = np.arange(num_experts, dtype=np.int32)
    return np.tile(expert_E, (num_layers, 1))


def place(
    load_NE: Float[np.ndarray, "N E"],
    num_devices: int,
    replicas: int = 0,
) -> Int[np.ndarray, "N P"]:
    """Returns the expert in each slot, so that devices have nearly the same load.

    A layer takes the simplest of three placements that is not less even than a later one by more
    than `EVEN`: the identity placement, experts in other places, and those with replicas
    (`place_by_load`). Where it takes one of the first two, its spare slots repeat experts of the
    same device, which changes no load: replicas never make a layer less even.

    Args:
      load_NE: of each expert in each layer, in any unit.
      num_devices: n.
      replicas: spare slots of each device.

    Returns:
      P = E + n * `replicas` slots, those of a device together.

    Raises:
      PlacementError: experts do not divide over the devices, or too many replicas.
    """
    with_replicas_NP = place_by_load(load_NE, num_devices, replicas)
    without_replicas_NE = place_by_load(load_NE, num_devices)
    without_replicas_NP = _repeat(without_replicas_NE, num_devices, replicas)
    identity_NE = identity_placement(*load_NE.shape)
    chosen_NP = _repeat(identity_NE, num_devices, replicas)
    for other_NP in (without_replicas_NP, with_replicas_NP):
        chosen_imbalance_N = imbalance(load_NE, chosen_NP, num_devices)
        other_imbalance_N = imbalance(load_NE, other_NP, num_devices)
        gain_N = chosen_imbalance_N - other_imbalance_N
        is_more_even_N = gain_N > EVEN
        chosen_NP = np.where(is_more_even_N[:, None], other_NP, chosen_NP)
    return chosen_NP


def place_by_load(
    load_NE: Float[np.ndarray, "N E"],
    num_devices: int,
    replicas: int = 0,
) -> Int[np.ndarray, "N P"]:
    """Returns the expert in each slot by load alone; see `place`.

    The identity placement may be more even. Spare slots go one by one to the expert with most load
    per replica. Then replicas, those with most load first, go to the device with least load that
    has a free slot and, if there is such a device, no replica of the same expert.
    """
    num_experts = load_NE.shape[1]
    if num_devices < 1 or num_experts % num_devices:
        raise PlacementError(
            f"{num_experts} experts do not divide over {num_devices} devices; "
            f"use a divisor of {num_experts}"
        )
    most = num_experts - num_experts // num_devices
    if not 0 <= replicas <= most:
        raise PlacementError(
            f"{replicas} replicas on a device must be between 0 and {most}, as many as it lacks"
        )
    load_NE = load_NE.astype(np.float64)
    layers = [_place_layer(load_E, num_devices, replicas) for load_E in load_NE]
    return np.stack(layers)


def _repeat(
    experts_NE: Int[np.ndarray, "N E"],
    num_devices: int,
    replicas: int,
) -> Int[np.ndarray, "N P"]:
    """Returns the placement with spare slots, which repeat the experts of their device in turn."""
    num_layers = len(experts_NE)
    experts_NnS = experts_NE.reshape(num_layers, num_devices, -1)
    num_slots = experts_NnS.shape[2] + replicas
    slots = np.arange(num_slots)
    repeated_NnS = np.take(experts_NnS, slots, axis=2, mode="wrap")
    sorted_NnS = np.sort(repeated_NnS, axis=2)
    return sorted_NnS.reshape(num_layers, -1)


@dataclasses.dataclass
class _Device:
    """A device that is being filled: its experts, and their load."""

    num_slots: int
    experts: list[int] = dataclasses.field(default_factory=list)
    load: float = 0.0

    def preference(self, expert: int) -> tuple[bool, bool, float]:
        """Returns what is smallest for the device that takes the expert."""
        is_full = len(self.experts) == self.num_slots
        has_it = expert in self.experts
        return is_full, has_it, self.load

    def take(self, expert: int, load: float) -> None:
        """Gives the expert a slot."""
        self.experts.append(expert)
        self.load += load


def _place_layer(load_E, num_devices: int, replicas: int):
    """Returns the expert in each slot of one layer; C counts all replicas."""
    num_E = _replicas_by_load(load_E, num_devices, replicas)
    expert_C = np.repeat(np.arange(len(load_E)), num_E)
    share_E = load_E / num_E
    share_C = share_E[expert_C]
    num_slots = len(expert_C) // num_devices
    devices = [_Device(num_slots) for _ in range(num_devices)]
    for c in np.argsort(-share_C, kind="stable"):
        expert = int(expert_C[c])
        preferences = [device.preference(expert) for device in devices]
        first_best = preferences.index(min(preferences))
        devices[first_best].take(expert, share_C[c])
    sorted_by_device = [sorted(device.experts) for device in devices]
    experts_P = np.concatenate(sorted_by_device)
    return experts_P.astype(np.int32)


def _replicas_by_load(load_E, num_devices: int, replicas: int):
    """Returns how many replicas each expert has: spare slots go to the most load per replica."""
    num_E = np.ones(len(load_E), int)
    for _ in range(num_devices * replicas):
        # No expert needs two replicas on one device.
        may_have_more_E = num_E < num_devices
        load_per_replica_E = np.where(may_have_more_E, load_E / num_E, -1.0)
        fullest = np.argmax(load_per_replica_E)
        num_E[fullest] += 1
    return num_E


def imbalance(
    load_NE: Float[np.ndarray, "N E"],
    experts_NP: Int[np.ndarray, "N P"],
    num_devices: int,
) -> Float[np.ndarray, "N"]:
    """Returns the largest load of a device over the mean of all, by layer.

    1 is even; it is 0 where a layer has no load. Replicas of an expert share its load equally, as
    tokens take turns among them.
    """
    load_NE = load_NE.astype(np.float64)
    layers = zip(load_NE, experts_NP, strict=True)
    values = [_imbalance_of_layer(*layer, num_devices) for layer in layers]
    return np.array(values)


def _imbalance_of_layer(load_E, experts_P, num_devices: int) -> float:
    """Returns the largest load of a device over the mean of all."""
    num_E = np.bincount(experts_P, minlength=len(load_E))
    share_E = load_E / np.maximum(num_E, 1)
    share_nS = share_E[experts_P].reshape(num_devices, -1)
    load_n = share_nS.sum(axis=1)
    if load_n.sum() <= 0:
        return 0.0
    return load_n.max() / load_n.mean()
