"""Which changes of routing to try on a model, and which have no meaning for it.

A `Change` says what `surgery` to do on which MoE layers. Layers of one model may differ: a change
is done on those where it makes sense, and what is left out is named with its reason.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moejax.config import ROUTER_RULES
from moejax.inspection.counterfactuals import interventions
from moejax.inspection.counterfactuals.interventions import Surgery
from moejax.moe.layer import MoE
from moejax.moe.router import UNRANKED

KINDS = ("top_k", "capacity", "bias_off", "ablate", "swap", "merge", "random", "uniform")
NOT_SELECTABLE, OUTPUT_ZERO = "not selectable", "output 0"
CAPACITY_FACTORS = (2.0, 1.25, 1.0, 0.75, 0.5)
NUM_PAIRS = 2

LeftOut = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Change:
    """What is changed.

    Attributes:
      kind: of `KINDS`.
      what: in words.
      surgeries: what to do, by MoE layer, counted from 0.
      layer: the model's layer, where it is one alone.
      experts: that it concerns.
      setting: K or the capacity factor.
    """

    kind: str
    what: str
    surgeries: Mapping[int, Surgery]
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
        """One line of the reasons, by MoE layer."""
        by_reason: dict[str, list[str]] = {}
        for index, reason in reasons.items():
            by_reason.setdefault(reason, []).append(str(self.numbers[index]))
        if len(by_reason) == 1 and len(reasons) == len(self.moes):
            return next(iter(by_reason))
        return "; ".join(
            f"layer{'s' * (len(where) > 1)} {', '.join(where)}: {reason}"
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
) -> tuple[list[Change], LeftOut]:
    """The changes of some kinds, and what is left out of them with the reason.

    Args:
      layers: of the model.
      kinds: of `KINDS`.
      top_k: numbers of experts per token; None: from 1 to twice the run's, at most E.
      capacity_factors: of evaluation.
      num_pairs: of experts drawn at random in each layer, to swap and to merge, beside
        the chosen one.
      seed: of that.
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
    changes: list[Change] = []
    left_out: LeftOut = {}
    for kind in kinds:
        more, without = planners[kind]()
        changes += more
        left_out |= without
    return changes, left_out


def _plan_top_k(layers: Layers, top_k: Sequence[int] | None) -> tuple[list[Change], LeftOut]:
    most = max(
        min(moe.config.num_choices, 2 * interventions.chosen_per_token(moe)) for moe in layers.moes
    )
    changes, left_out = [], {}
    for k in range(1, most + 1) if top_k is None else top_k:
        reasons = {
            n: reason
            for n, moe in enumerate(layers.moes)
            if (reason := interventions.why_not_top_k(moe, k))
        }
        surgeries = {
            n: functools.partial(interventions.with_top_k, top_k=k)
            for n in range(len(layers.moes))
            if n not in reasons
        }
        if reasons:
            left_out[f"top_k: K={k}"] = layers.explain(reasons)
        if surgeries:
            changes.append(Change("top_k", f"K = {k}", surgeries, setting=float(k)))
    return changes, left_out


def _plan_capacity(layers: Layers, factors: Sequence[float]) -> tuple[list[Change], LeftOut]:
    reasons = {
        n: f"moe.router={moe.config.router}: experts choose, and none can overflow"
        for n, moe in enumerate(layers.moes)
        if not ROUTER_RULES[moe.config.router].takes_capacity
    }
    others = [n for n in range(len(layers.moes)) if n not in reasons]
    changes = [
        Change(
            "capacity",
            f"capacity factor {factor:g}",
            {
                n: functools.partial(interventions.with_capacity, factor=float(factor))
                for n in others
            },
            setting=float(factor),
        )
        for factor in factors
        if others
    ]
    return changes, {"capacity": layers.explain(reasons)} if reasons else {}


def _plan_bias_off(layers: Layers) -> tuple[list[Change], LeftOut]:
    with_bias = [n for n, moe in enumerate(layers.moes) if moe.config.has_selection_bias]
    if not with_bias:
        return [], {"bias_off": "no layer has a selection bias"}
    return [
        Change("bias_off", "selection bias 0", dict.fromkeys(with_bias, interventions.without_bias))
    ], {}


def _plan_ablations(layers: Layers) -> tuple[list[Change], LeftOut]:
    changes, unranked, unsilenced = [], {}, {}
    for n, moe in enumerate(layers.moes):
        if moe.config.router in UNRANKED:
            unranked[n] = (
                f"moe.router={moe.config.router} ranks no expert behind those that a token visits"
            )
        for expert in range(moe.config.num_choices):
            where: dict[str, Any] = {"layer": layers.numbers[n], "experts": (expert,)}
            if n not in unranked:
                at = {n: functools.partial(interventions.blocked, expert=expert)}
                changes.append(Change("ablate", NOT_SELECTABLE, at, **where))
            if reason := interventions.why_not_ablated(moe, expert):
                unsilenced[n] = reason
            else:
                at = {n: functools.partial(interventions.ablated, expert=expert)}
                changes.append(Change("ablate", OUTPUT_ZERO, at, **where))
    ways = {NOT_SELECTABLE: unranked, OUTPUT_ZERO: unsilenced}
    return changes, {
        f"ablate: {way}": layers.explain(reasons) for way, reasons in ways.items() if reasons
    }


def _plan_pairs(
    layers: Layers, kind: str, num_pairs: int, seed: int
) -> tuple[list[Change], LeftOut]:
    operate = {"swap": interventions.swapped, "merge": interventions.merged}[kind]
    changes, reasons = [], {}
    for n, moe in enumerate(layers.moes):
        num_experts = moe.config.num_experts
        if num_experts < 2:
            reasons[n] = f"moe.num_experts={num_experts} has no two experts"
            continue
        if kind == "swap":
            name, pair = "busiest, rarest", extremes(layers.load_NE[n, :num_experts])
        else:
            name, pair = "most similar", most_similar(interventions.similarity(moe.experts))
        pairs = [(name, pair)] + [
            ("random pair", other)
            for other in random_pairs(num_experts, num_pairs, [seed, n], without=pair)
        ]
        for what, (first, second) in pairs:
            at = {n: functools.partial(operate, first=first, second=second)}
            changes.append(Change(kind, what, at, layer=layers.numbers[n], experts=(first, second)))
    return changes, {kind: layers.explain(reasons)} if reasons else {}


def _plan_routing(layers: Layers, kind: str) -> tuple[list[Change], LeftOut]:
    operate = {
        "random": interventions.with_random_routing,
        "uniform": interventions.with_uniform_routing,
    }[kind]
    what = {"random": "random experts", "uniform": "all experts alike"}[kind]
    reasons = {
        n: "moe.router=soft mixes all tokens into every slot, and chooses no experts"
        for n, moe in enumerate(layers.moes)
        if kind == "random" and moe.config.router == "soft"
    }
    others = [n for n in range(len(layers.moes)) if n not in reasons]
    changes = [Change(kind, what, dict.fromkeys(others, operate))] if others else []
    if len(layers.moes) > 1:
        changes += [Change(kind, what, {n: operate}, layer=layers.numbers[n]) for n in others]
    return changes, {kind: layers.explain(reasons)} if reasons else {}


def extremes(load_E: Int[np.ndarray, "E"]) -> tuple[int, int]:
    """The busiest expert and the least used one, two different ones."""
    order_E = np.argsort(load_E, kind="stable")
    return int(order_E[-1]), int(order_E[0])


def most_similar(similarity_EE: Float[np.ndarray, "E E"]) -> tuple[int, int]:
    """The two different experts of highest similarity."""
    above_EE = np.where(np.triu(np.ones(similarity_EE.shape, bool), 1), similarity_EE, -np.inf)
    first, second = np.unravel_index(np.argmax(above_EE), above_EE.shape)
    return int(first), int(second)


def random_pairs(
    num_experts: int, num_pairs: int, seed: Sequence[int], *, without: tuple[int, int]
) -> list[tuple[int, int]]:
    """Different pairs of experts, fewer if there are no more; `without` is not among them."""
    pairs = [
        pair for pair in itertools.combinations(range(num_experts), 2) if set(pair) != set(without)
    ]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:num_pairs]
    return [pairs[i] for i in drawn]
