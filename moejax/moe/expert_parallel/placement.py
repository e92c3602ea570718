"""Where experts live: a map from slots on devices to experts, chosen from the load that was measured.

Devices have equal numbers of slots, one after another. Experts in order are the map without a
choice; copies of those with most load fill spare slots. Nothing but the map changes: outputs
are the same.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

EVEN = 0.005
"""Differences of `imbalance` up to this are none: load that was measured says no more of load to come."""


class PlacementError(ValueError):
    """Experts that cannot be placed so."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Where to find each expert of each layer.

    Attributes:
      slots_NEM: the slots of its copies, at most M; repeated where it has fewer.
      num_NE: how many copies it has.
    """

    slots_NEM: Int[np.ndarray, "N E M"]
    num_NE: Int[np.ndarray, "N E"]

    @classmethod
    def from_placement(cls, experts_NP: Int[np.ndarray, "N P"], num_experts: int) -> "Replicas":
        """From the expert in each slot.

        Raises:
          PlacementError: an expert has no slot.
        """
        num_NE = (experts_NP[:, :, None] == np.arange(num_experts)).sum(axis=1)
        if num_NE.min() < 1 or num_NE.sum() != experts_NP.size:
            raise PlacementError(
                f"every one of {num_experts} experts, and no other, must have a slot in every layer"
            )
        slots_NEM = np.zeros((*num_NE.shape, num_NE.max()), np.int32)
        for layer, experts_P in enumerate(experts_NP):
            for expert in range(num_experts):
                slots_NEM[layer, expert] = np.resize(
                    np.flatnonzero(experts_P == expert), num_NE.max()
                )
        return cls(slots_NEM, num_NE.astype(np.int32))


def identity_placement(num_layers: int, num_experts: int) -> Int[np.ndarray, "N E"]:
    """The map without a choice: expert e in slot e."""
    return np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))


def place(
    load_NE: Float[np.ndarray, "N E"], num_devices: int, replicas: int = 0
) -> Int[np.ndarray, "N P"]:
    """The expert in each slot, so that devices have nearly the same load.

    A layer takes the simplest of three maps that is not less even than a later one by more than
    `EVEN`: experts in order, experts in other places, and those with copies (`place_by_load`).
    Where it takes one of the first two, its spare slots repeat experts of the same device, which
    changes no load: copies never make a layer less even.

    Args:
      load_NE: of each expert in each layer, in any unit.
      num_devices: n.
      replicas: spare slots of each device.

    Returns:
      P = E + n * `replicas` slots, those of a device together.

    Raises:
      PlacementError: experts do not divide over the devices, or a size that cannot be.
    """
    with_copies_NP = place_by_load(load_NE, num_devices, replicas)
    chosen_NP = _repeat(identity_placement(*load_NE.shape), num_devices, replicas)
    for other_NP in (
        _repeat(place_by_load(load_NE, num_devices), num_devices, replicas),
        with_copies_NP,
    ):
        gain_N = imbalance(load_NE, chosen_NP, num_devices) - imbalance(
            load_NE, other_NP, num_devices
        )
        chosen_NP = np.where(gain_N[:, None] > EVEN, other_NP, chosen_NP)
    return chosen_NP


def place_by_load(
    load_NE: Float[np.ndarray, "N E"], num_devices: int, replicas: int = 0
) -> Int[np.ndarray, "N P"]:
    """The expert in each slot by load alone, even where experts in order would be more even; see `place`.

    Spare slots go one by one to the expert with most load a copy. Then copies, those with most load
    first, go to the device with least load that has a free slot and, if there is one, no copy of
    the same expert.
    """
    num_experts = load_NE.shape[1]
    if num_devices < 1 or num_experts % num_devices:
        raise PlacementError(
            f"{num_experts} experts do not divide over {num_devices} devices; use a divisor of {num_experts}"
        )
    if not 0 <= replicas <= num_experts - num_experts // num_devices:
        most = num_experts - num_experts // num_devices
        raise PlacementError(
            f"{replicas} replicas on a device must be between 0 and {most}, as many as it lacks"
        )
    return np.stack(
        [_place_layer(load_E, num_devices, replicas) for load_E in load_NE.astype(np.float64)]
    )


def _repeat(
    experts_NE: Int[np.ndarray, "N E"], num_devices: int, replicas: int
) -> Int[np.ndarray, "N P"]:
    """The same map with spare slots, which repeat the experts of their device in turn."""
    experts_NnS = experts_NE.reshape(len(experts_NE), num_devices, -1)
    num_slots = experts_NnS.shape[2] + replicas
    repeated_NnS = np.take(experts_NnS, np.arange(num_slots), axis=2, mode="wrap")
    return np.sort(repeated_NnS, axis=2).reshape(len(experts_NE), -1)


def _place_layer(load_E, num_devices: int, replicas: int):
    num_E = np.ones(len(load_E), int)
    for _ in range(num_devices * replicas):
        # No expert needs two copies on one device.
        num_E[np.argmax(np.where(num_E < num_devices, load_E / num_E, -1.0))] += 1
    copies = np.repeat(np.arange(len(load_E)), num_E)
    share_C = (load_E / num_E)[copies]
    capacity = len(copies) // num_devices
    experts_of: list[list[int]] = [[] for _ in range(num_devices)]
    load_n = np.zeros(num_devices)
    for c in np.argsort(-share_C, kind="stable"):
        expert = int(copies[c])
        is_full_n = np.array([len(experts) == capacity for experts in experts_of])
        has_n = np.array([expert in experts for experts in experts_of])
        device = min(range(num_devices), key=lambda d: (is_full_n[d], has_n[d], load_n[d]))
        experts_of[device].append(expert)
        load_n[device] += share_C[c]
    return np.array([expert for experts in experts_of for expert in sorted(experts)], np.int32)


def imbalance(
    load_NE: Float[np.ndarray, "N E"], experts_NP: Int[np.ndarray, "N P"], num_devices: int
) -> Float[np.ndarray, "N"]:
    """The largest load of a device over the mean of all, by layer; 1 is even, and 0 where a layer has no load.

    Copies of an expert share its load equally, as tokens take turns among them.
    """
    found = []
    for load_E, experts_P in zip(load_NE.astype(np.float64), experts_NP, strict=True):
        share_E = load_E / np.maximum(np.bincount(experts_P, minlength=len(load_E)), 1)
        load_n = share_E[experts_P].reshape(num_devices, -1).sum(axis=1)
        found.append(load_n.max() / load_n.mean() if load_n.sum() > 0 else 0.0)
    return np.array(found)
