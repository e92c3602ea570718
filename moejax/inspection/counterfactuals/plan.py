"""Which interventions on routing to try on a model, and which have no meaning for it.

An `Intervention` says how to edit which MoE layers. Layers of one model may differ: an intervention
is made on those where it makes sense, and what is left out is named with its reason.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from moejax.config import ROUTER_RULES
from moejax.inspection.counterfactuals import interventions
from moejax.inspection.counterfactuals.interventions import LayerEdit
from moejax.moe.layer import MoE
from moejax.moe.router import UNRANKED

KINDS = ("top_k", "capacity", "bias_off", "ablate", "swap", "merge", "random", "uniform")
NOT_SELECTABLE, OUTPUT_ZERO = "not selectable", "output 0"
CAPACITY_FACTORS = (2.0, 1.25, 1.0, 0.75, 0.5)
NUM_PAIRS = 2

LeftOut = dict[str, str]
"""Reasons by what was left out."""


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What is changed in a model.

    Attributes:
      kind: of `KINDS`.
      what: in words.
      edits: what to do with each changed MoE layer, counted from 0.
      layer: the model's layer, where only one is changed.
      experts: that it concerns.
      setting: K or the capacity factor.
    """

    kind: str
    what: str
    edits: Mapping[int, LayerEdit]
    layer: int | None = None
    experts: tuple[int, ...] = ()
    setting: float | None = None


@dataclasses.dataclass(frozen=True)
class Layers:
    """The MoE layers of a model.

    Attributes:
      moes: the layers.
      numbers: which layers of the model they are.
      load_NE: choices of each expert, over the rows that are evaluated.
    """

    moes: Sequence[MoE]
    numbers: Sequence[int]
    load_NE: Int[np.ndarray, "N E"]

    def explain(self, reasons: Mapping[int, str]) -> str:
        """Returns one line of the reasons, by MoE layer."""
        by_reason: dict[str, list[str]] = {}
        for index, reason in reasons.items():
            by_reason.setdefault(reason, []).append(str(self.numbers[index]))
        is_same_everywhere = len(by_reason) == 1 and len(reasons) == len(self.moes)
        if is_same_everywhere:
            return next(iter(by_reason))
        return "; ".join(
            f"{'layers' if len(where) > 1 else 'layer'} {', '.join(where)}: {reason}"
            for reason, where in by_reason.items()
        )


def plan(
    layers: Layers,
    kinds: Sequence[str],
    *,
    top_k: Sequence[int] | None = None,
    capacity_factors: Sequence[float] = CAPACITY_FACTORS,
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
) -> tuple[list[Intervention], LeftOut]:
    """Plans the interventions of some kinds, and says what is left out of them and why.

    Args:
      layers: of the model.
      kinds: of `KINDS`.
      top_k: numbers of experts per token; None: from 1 to twice the run's, at most E.
      capacity_factors: of evaluation.
      num_pairs: of experts drawn at random in each layer, to swap and to merge, in addition to
        the chosen one.
      seed: of that draw.
    """
    planners = {
        "top_k": lambda: _plan_top_k(layers, top_k),
        "capacity": lambda: _plan_capacity(layers, capacity_factors),
        "bias_off": lambda: _plan_bias_off(layers),
        "ablate": lambda: _plan_ablations(layers),
        "swap": lambda: _plan_pairs(layers, "swap", num_pairs, seed),
        "merge": lambda: _plan_pairs(layers, "merge", num_pairs, seed),
        "random": lambda: _plan_routing(layers, "random"),
        "uniform": lambda: _plan_routing(layers, "uniform"),
    }
    planned: list[Intervention] = []
    left_out: LeftOut = {}
    for kind in kinds:
        of_kind, left_out_of_kind = planners[kind]()
        planned += of_kind
        left_out |= left_out_of_kind
    return planned, left_out


def _plan_top_k(layers: Layers, top_k: Sequence[int] | None) -> tuple[list[Intervention], LeftOut]:
    if top_k is None:
        top_k = range(1, _most_experts(layers) + 1)
    planned, left_out = [], {}
    for k in top_k:
        edits: dict[int, LayerEdit] = {}
        reasons: dict[int, str] = {}
        for n, moe in enumerate(layers.moes):
            reason = interventions.why_not_top_k(moe, k)
            if reason:
                reasons[n] = reason
            else:
                edits[n] = interventions.with_top_k(moe, k)
        if reasons:
            left_out[f"top_k: K={k}"] = layers.explain(reasons)
        if edits:
            planned.append(Intervention("top_k", f"K = {k}", edits, setting=float(k)))
    return planned, left_out


def _most_experts(layers: Layers) -> int:
    """Returns twice the largest K of the layers, at most the width of that layer's router."""
    most = 0
    for moe in layers.moes:
        doubled = 2 * interventions.chosen_per_token(moe)
        most = max(most, min(moe.config.num_choices, doubled))
    return most


def _plan_capacity(layers: Layers, factors: Sequence[float]) -> tuple[list[Intervention], LeftOut]:
    reasons = {}
    for n, moe in enumerate(layers.moes):
        router = moe.config.router
        if not ROUTER_RULES[router].takes_capacity:
            reasons[n] = f"moe.router={router}: experts choose, and none can overflow"
    limited = _all_but(layers, reasons)
    planned = []
    for factor in factors if limited else ():
        what = f"capacity factor {factor:g}"
        edits = dict.fromkeys(limited, interventions.with_capacity(factor))
        planned.append(Intervention("capacity", what, edits, setting=float(factor)))
    return planned, _left_out(layers, "capacity", reasons)


def _all_but(layers: Layers, reasons: Mapping[int, str]) -> list[int]:
    """Returns the MoE layers that nothing speaks against."""
    return [n for n in range(len(layers.moes)) if n not in reasons]


def _left_out(layers: Layers, what: str, reasons: Mapping[int, str]) -> LeftOut:
    """Returns the reasons in one line, nothing where there are none."""
    return {what: layers.explain(reasons)} if reasons else {}


def _plan_bias_off(layers: Layers) -> tuple[list[Intervention], LeftOut]:
    with_bias = [n for n, moe in enumerate(layers.moes) if moe.config.has_selection_bias]
    if not with_bias:
        return [], {"bias_off": "no layer has a selection bias"}
    edits = dict.fromkeys(with_bias, interventions.without_bias())
    return [Intervention("bias_off", "selection bias 0", edits)], {}


def _plan_ablations(layers: Layers) -> tuple[list[Intervention], LeftOut]:
    planned: list[Intervention] = []
    not_blockable: dict[int, str] = {}
    not_ablatable: dict[int, str] = {}
    for n, moe in enumerate(layers.moes):
        router = moe.config.router
        if router in UNRANKED:
            not_blockable[n] = (
                f"moe.router={router} ranks no expert after those that a token visits"
            )
        for expert in range(moe.config.num_choices):
            if n not in not_blockable:
                block = interventions.blocked(moe.config, expert)
                planned.append(_ablation(layers, n, expert, NOT_SELECTABLE, block))
            reason = interventions.why_not_ablated(moe, expert)
            if reason:
                not_ablatable[n] = reason
            else:
                ablate = interventions.ablated(moe.config, expert)
                planned.append(_ablation(layers, n, expert, OUTPUT_ZERO, ablate))
    left_out = _left_out(layers, f"ablate: {NOT_SELECTABLE}", not_blockable)
    left_out |= _left_out(layers, f"ablate: {OUTPUT_ZERO}", not_ablatable)
    return planned, left_out


def _ablation(layers: Layers, n: int, expert: int, way: str, edit: LayerEdit) -> Intervention:
    """Returns the ablation of one expert of MoE layer n."""
    return Intervention("ablate", way, {n: edit}, layer=layers.numbers[n], experts=(expert,))


def _plan_pairs(
    layers: Layers, kind: str, num_pairs: int, seed: int
) -> tuple[list[Intervention], LeftOut]:
    make_edit = {"swap": interventions.swapped, "merge": interventions.merged}[kind]
    planned, reasons = [], {}
    for n, moe in enumerate(layers.moes):
        num_experts = moe.config.num_experts
        if num_experts < 2:
            reasons[n] = f"moe.num_experts={num_experts} has no two experts"
            continue
        for what, pair in _pairs_to_edit(layers, n, kind, num_pairs, seed):
            edit = make_edit(moe.config, *pair)
            number = layers.numbers[n]
            planned.append(Intervention(kind, what, {n: edit}, layer=number, experts=pair))
    return planned, _left_out(layers, kind, reasons)


def _pairs_to_edit(
    layers: Layers, n: int, kind: str, num_pairs: int, seed: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields names and pairs of experts of MoE layer n: one chosen pair, then random ones."""
    moe = layers.moes[n]
    num_experts = moe.config.num_experts
    if kind == "swap":
        chosen = extremes(layers.load_NE[n, :num_experts])
        yield "busiest, rarest", chosen
    else:
        chosen = most_similar(interventions.similarity(moe.experts))
        yield "most similar", chosen
    for pair in random_pairs(num_experts, num_pairs, [seed, n], without=chosen):
        yield "random pair", pair


def _plan_routing(layers: Layers, kind: str) -> tuple[list[Intervention], LeftOut]:
    make_edit, what = {
        "random": (interventions.with_random_routing, "random experts"),
        "uniform": (interventions.with_uniform_routing, "all experts alike"),
    }[kind]
    reasons = {}
    for n, moe in enumerate(layers.moes):
        if kind == "random" and moe.config.router == "soft":
            reasons[n] = "moe.router=soft mixes all tokens into every slot, and chooses no experts"
    edits = {n: make_edit(layers.moes[n]) for n in _all_but(layers, reasons)}
    planned = []
    if edits:
        planned.append(Intervention(kind, what, edits))
    if len(layers.moes) > 1:
        for n, edit in edits.items():
            planned.append(Intervention(kind, what, {n: edit}, layer=layers.numbers[n]))
    return planned, _left_out(layers, kind, reasons)


def extremes(load_E: Int[np.ndarray, "E"]) -> tuple[int, int]:
    """Returns the busiest expert and the least used one, two different ones."""
    order_E = np.argsort(load_E, kind="stable")
    return int(order_E[-1]), int(order_E[0])


def most_similar(similarity_EE: Float[np.ndarray, "E E"]) -> tuple[int, int]:
    """Returns the two different experts of highest similarity."""
    first_P, second_P = np.triu_indices(len(similarity_EE), k=1)  # all pairs
    similarity_P = similarity_EE[first_P, second_P]
    best = np.argmax(similarity_P)
    return int(first_P[best]), int(second_P[best])


def random_pairs(
    num_experts: int, num_pairs: int, seed: Sequence[int], *, without: tuple[int, int]
) -> list[tuple[int, int]]:
    """Draws different pairs of experts, fewer if there are no more, and never `without`."""
    all_pairs = itertools.combinations(range(num_experts), 2)
    pairs = [pair for pair in all_pairs if set(pair) != set(without)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[index] for index in order[:num_pairs]]
