"""From budgets, a rule and arms to the configurations of a ladder."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax.sweeps.arms import Arm, Plan, Recipe, SweepError, describe, plan_arms
from moejax.sweeps.matching import short

STEPS, SEED, EXPERTS = "train.num_steps", "train.seed", "moe.num_experts"

LEAST_STEPS = 10
"""Of a run: with fewer, rounding to whole steps would miss the budget by more than 5 %."""

Point = Mapping[str, Any]
"""Values by dotted key."""

Rule = Callable[[float, Point], Point]
"""From a budget in FLOPs and the point of an arm to what the rung sets in the recipe."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm of a ladder at one rung with one seed.

    Attributes:
      arm: its name, which it has at every rung.
      budget: FLOPs of training that the rung allows.
      seed: `train.seed`.
      id: of the arm of the sweep, which names its run directory.
    """

    arm: str
    budget: float
    seed: int
    id: str


@dataclasses.dataclass(frozen=True)
class LadderPlan:
    """A ladder that can be trained.

    Attributes:
      plan: all configurations, the cheapest rung first.
      runs: what each of them is.
      points: what each arm sets, by name.
      rungs: what the rule sets for each arm at each rung, by budget and name.
    """

    plan: Plan
    runs: tuple[Run, ...]
    points: Mapping[str, Point]
    rungs: Mapping[float, Mapping[str, Point]]


def plan_ladder(
    base: Recipe,
    points: Iterable[Point],
    budgets: Sequence[float],
    rule: Rule,
    num_seeds: int,
) -> LadderPlan:
    """Plans the runs of all arms at all rungs.

    The steps of a run are the whole number whose FLOPs are nearest to the budget; FLOPs are those
    of `planning.count`, which counts the products of the model's matrices in training.

    Args:
      base: the recipe: sections of leaves.
      points: what each arm sets; it goes before what the rule sets.
      budgets: FLOPs of training of the rungs, increasing.
      rule: gives the shape of a rung.
      num_seeds: of each arm at each rung, from 0.

    Raises:
      SweepError: budgets that do not increase, a rule that sets steps or seeds, arms that are the
        same, or runs that cannot work.
    """
    _check_budgets(budgets)
    named = name_arms(points)
    arms: dict[str, Arm] = {}
    runs: list[Run] = []
    rungs: dict[float, dict[str, Point]] = {}
    for budget in budgets:
        rungs[budget] = {}
        for name, point in named.items():
            rung = _apply_rule(rule, budget, point)
            rungs[budget][name] = rung
            for seed, arm in enumerate(_arms_of_rung(base, rung, point, budget, num_seeds)):
                if arm.id in arms:
                    raise _same_arms(arm, runs, name)
                arms[arm.id] = arm
                runs.append(Run(name, budget, seed, arm.id))
    return LadderPlan(Plan(tuple(arms.values())), tuple(runs), named, rungs)


def _check_budgets(budgets: Sequence[float]) -> None:
    if not budgets:
        raise SweepError(
            "the ladder has no rungs; give --budgets=1e12,4e12,1.6e13, in FLOPs of training"
        )
    is_rising = all(low < high for low, high in itertools.pairwise(budgets))
    if not (is_rising and budgets[0] > 0 and math.isfinite(budgets[-1])):
        listed = ",".join(f"{budget:g}" for budget in budgets)
        raise SweepError(
            f"budgets {listed} must be positive numbers of FLOPs that increase, such as "
            "1e12,4e12,1.6e13"
        )


def name_arms(points: Iterable[Point]) -> dict[str, Point]:
    """Returns arms by name: what each sets, in short, or `dense`.

        {"moe.num_experts": 8, "moe.top_k": 2}    num_experts=8,top_k=2
        {"moe.num_experts": 0}                    dense
        {}                                        recipe

    Leaves that several sections have keep the name of theirs. Dense arms that differ in leaves of
    experts alone are one, as axes of experts multiply them.

    Raises:
      SweepError: a point that sets steps or seeds, or two points that are the same.
    """
    listed = [_of_what_it_has(point) for point in points]
    keys = {key for point in listed for key in point}
    leaf_names = [key.rpartition(".")[2] for key in keys]
    named: dict[str, Point] = {}
    for point in listed:
        _refuse_steps(point, "an arm")
        words = []
        for key, value in point.items():
            leaf = key.rpartition(".")[2]
            words.append(f"{leaf if leaf_names.count(leaf) == 1 else key}={value}")
        if _is_dense(point):
            words = ["dense", *(word for word in words if word != "num_experts=0")]
        name = ",".join(words) or "recipe"
        if name in named and not _is_dense(point):
            raise SweepError(f"the arm {name} is given twice; leave one out")
        named[name] = point
    if not named:
        raise SweepError(
            "the ladder has no arms; give axes, such as moe.num_experts=0,8,32, or a sweep() that "
            "yields points"
        )
    return named


def _of_what_it_has(point: Point) -> Point:
    """Returns a point; of a dense one without what it sets of experts."""
    if not _is_dense(point):
        return dict(point)
    kept = {key: value for key, value in point.items() if not key.startswith(("moe.", "schedule."))}
    return {EXPERTS: 0, **kept}


def _is_dense(point: Point) -> bool:
    return point.get(EXPERTS) == 0


def _refuse_steps(point: Point, what: str) -> None:
    for key in (STEPS, SEED):
        if key in point:
            raise SweepError(
                f"{what} sets {key}={point[key]}, which a ladder sets itself; leave it out, and "
                "use --budgets and --seeds"
            )


def _apply_rule(rule: Rule, budget: float, point: Point) -> Point:
    """Returns what a rung sets for an arm, where the arm sets nothing itself."""
    rung = dict(rule(budget, point))
    _refuse_steps(rung, "the recipe's rung()")
    return {key: value for key, value in rung.items() if key not in point}


def _arms_of_rung(
    base: Recipe, rung: Point, point: Point, budget: float, num_seeds: int
) -> list[Arm]:
    """Returns an arm at a rung, once for each seed."""
    # Leaves of the rung belong to the recipe: an arm need not read all of them.
    recipe = _with_leaves(base, rung)
    (one,) = plan_arms(recipe, [point]).arms
    num_steps = _steps_of(one, budget)
    points = []
    for seed in range(num_seeds):
        points.append({**point, STEPS: num_steps, SEED: seed})
    arms = plan_arms(recipe, points).arms
    return [dataclasses.replace(arm, overrides={**rung, **arm.overrides}) for arm in arms]


def _with_leaves(base: Recipe, leaves: Point) -> dict[str, dict[str, Any]]:
    """Returns the sections of a recipe with some leaves set."""
    recipe = {section: dict(values) for section, values in base.items()}
    for key, value in leaves.items():
        section, _, name = key.partition(".")
        recipe.setdefault(section, {})[name] = value
    return recipe


def _steps_of(arm: Arm, budget: float) -> int:
    """Returns the number of steps whose FLOPs are nearest to a budget."""
    train, data = arm.config.train, arm.config.data
    step_flops = arm.count.flops_per_token * train.batch_size * data.seq_len
    num_steps = round(budget / step_flops)
    if num_steps < LEAST_STEPS:
        raise SweepError(
            f"{describe(arm.overrides)}: {short(budget)}FLOP pays for {budget / step_flops:.1f} "
            f"steps, and a run has at least {LEAST_STEPS}; let rung() give smaller models or "
            "batches at this budget, or leave it out"
        )
    return num_steps


def _same_arms(arm: Arm, runs: Sequence[Run], name: str) -> SweepError:
    (first,) = (run for run in runs if run.id == arm.id)
    if first.arm == name:
        return SweepError(
            f"the arm {name} is the same at {short(first.budget)}FLOP and at the next budget; "
            "leave one of them out"
        )
    return SweepError(
        f"the arms {first.arm} and {name} have the same configuration at "
        f"{short(first.budget)}FLOP; leave one of them out"
    )
