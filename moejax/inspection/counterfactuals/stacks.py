"""Stacks interventions that are one program with other arrays, as many as memory has room for."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import jax
import numpy as np

from moejax.data import Batch
from moejax.inspection.counterfactuals.interventions import LayerEdit
from moejax.inspection.counterfactuals.passes import Parts
from moejax.inspection.counterfactuals.plan import Intervention

MEMORY = 2**30
"""Bytes that the interventions of a stack may take, as far as `bytes_per_intervention` knows."""


@dataclasses.dataclass(frozen=True)
class InterventionStack:
    """Interventions that run together.

    Attributes:
      places: of its interventions in the plan; the last one is repeated where a stack would have
        fewer than the others of its kind, which then share a program.
      edits: by MoE layer; arrays have a leading axis of interventions.
    """

    places: tuple[int, ...]
    edits: Mapping[int, LayerEdit]


def stack_interventions(planned: Sequence[Intervention], most: int) -> list[InterventionStack]:
    """Returns stacks of at most that many interventions, in which each of the plan is once."""
    places_by_program: dict[Hashable, list[int]] = {}
    for place, intervention in enumerate(planned):
        places_by_program.setdefault(_program(intervention), []).append(place)
    stacks = []
    for places in places_by_program.values():
        num_stacks = -(-len(places) // most)
        size = -(-len(places) // num_stacks)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            chosen += chosen[-1:] * (size - len(chosen))
            stacks.append(_stack(planned, chosen))
    return stacks


def most_at_once(parts: Parts, batch: Batch) -> int:
    """Returns how many interventions memory has room for, at least 1."""
    return max(1, MEMORY // bytes_per_intervention(parts, batch))


def bytes_per_intervention(parts: Parts, batch: Batch) -> int:
    """Returns about how much memory a layer takes in one intervention.

    Its experts' weights twice, as grouped products repeat them and an intervention may change
    them; and per token the residual stream and what is made of it, the scores of attention, and
    the hidden units of twice the experts that it visits.
    """
    config, num_heads = parts.config.model, parts.config.attention.num_heads
    num_tokens, length = batch.tokens_BL.size, batch.tokens_BL.shape[1]
    most = 0
    for moe in parts.moes:
        num_weights = sum(array.size for array in jax.tree.leaves(moe.experts.weights()))
        hidden = 2 * moe.config.top_k * (2 * config.d_model + 3 * moe.config.d_expert)
        per_token = 10 * config.d_model + num_heads * length + hidden
        most = max(most, 2 * num_weights + num_tokens * per_token)
    return most * np.dtype(np.float32).itemsize


def _program(intervention: Intervention) -> Hashable:
    """Returns what interventions have in common that can be stacked."""
    edits = sorted(intervention.edits.items())
    return tuple((layer, jax.tree.structure(edit)) for layer, edit in edits)


def _stack(planned: Sequence[Intervention], places: Sequence[int]) -> InterventionStack:
    edits = [planned[place].edits for place in places]
    stacked = {}
    for layer in edits[0]:
        of_layer = [edit[layer] for edit in edits]
        stacked[layer] = jax.tree.map(lambda *arrays: np.stack(arrays), *of_layer)
    return InterventionStack(tuple(places), stacked)
