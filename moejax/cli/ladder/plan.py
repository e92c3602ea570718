"""What `moejax ladder` trains: read from the recipe and the command line, and shown."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import read_config_flag, recipe_text
from moejax.cli.recipe import explained, own_function, own_value, split_recipe
from moejax.cli.sweep.space import check_unique, own_spaces
from moejax.cli.tables import print_result, print_table
from moejax.sweeps import product, varied_keys
from moejax.sweeps.arms import Arm
from moejax.sweeps.ladder.gates import GateRule
from moejax.sweeps.ladder.plan import LadderPlan, Point, Rule, Run, plan_ladder
from moejax.sweeps.matching import short, training_flops
from moejax.sweeps.packing import pack_arms


def read_ladder(values: FlagValues, axes: list[str]) -> tuple[LadderPlan, GateRule]:
    """Returns the runs, each checked, and the gate of the recipe.

    Raises:
      UsageError: a flag or a part of the recipe cannot be used.
      SweepError: the ladder cannot be planned.
    """
    if values.seeds < 1:
        raise UsageError(f"--seeds={values.seeds} must be at least 1: how many seeds each arm gets")
    gate = _read_gate(values)
    rule = _read_rule(values)
    budgets = _read_budgets(values)
    spaces = own_spaces(values, axes)
    check_unique(spaces)
    points: Iterable[Point] = product(*spaces) if spaces else [{}]
    # Raises what is wrong with the recipe itself, apart from any point.
    read_config_flag(values, varied_keys(points))
    planned = plan_ladder(values.config.to_dict(), points, budgets, rule, values.seeds)
    return planned, gate


def _read_budgets(values: FlagValues) -> list[float]:
    """Returns the rungs' FLOPs, of `--budgets` or of the recipe."""
    listed = values.budgets
    source = "--budgets"
    if listed is None:
        listed = own_value(values, "BUDGETS")
        source = "BUDGETS of the recipe"
    if listed is None:
        raise UsageError(
            "--budgets is missing; give the FLOPs of the rungs, such as --budgets=1e12,4e12,1.6e13"
        )
    budgets = []
    for budget in listed:
        try:
            budgets.append(float(budget))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{source} has {budget!r}, which is no number of FLOPs; write 1e12,4e12,1.6e13"
            ) from error
    return budgets


def _read_rule(values: FlagValues) -> Rule:
    """Returns the recipe's `rung`, which is called as `rung(budget, arm)`."""
    recipe, _ = split_recipe(recipe_text(values))
    function = own_function(values, "rung")
    if function is None:
        raise UsageError(
            f"{recipe} has no function rung(budget, arm), which gives the shape of a model at a "
            "budget; configs/ladder.py has one"
        )
    num_parameters = len(inspect.signature(function).parameters)

    def rule(budget: float, point: Point) -> Point:
        arguments = (budget, dict(point))[:num_parameters]
        with explained(recipe):
            found = function(*arguments)
        if not isinstance(found, Mapping):
            raise UsageError(
                f"{recipe}: rung({budget:g}) returns {found!r}; return a dict of config keys and "
                "values, such as {'model.d_model': 128}"
            )
        return found

    return rule


def _read_gate(values: FlagValues) -> GateRule:
    """Returns what the recipe's `gate()` asks of a candidate; that of the defaults without it."""
    recipe, _ = split_recipe(recipe_text(values))
    function = own_function(values, "gate")
    if function is None:
        return GateRule()
    with explained(recipe):
        found = function()
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{recipe}: gate() returns {found!r}; return a dict, such as {{'speedup': 1.0}}"
        )
    return GateRule.from_recipe(found)


def print_ladder(values: FlagValues, planned: LadderPlan, gate: GateRule) -> None:
    """Prints the runs of each arm and rung, their cost, and what the ladder could see."""
    arms = {arm.id: arm for arm in planned.plan.arms}
    rows = [_row(run, arms[run.id], planned) for run in planned.runs if run.seed == 0]
    total = sum(training_flops(arm.config, arm.count) for arm in planned.plan.arms)
    num_candidates = max(len(planned.points) - 1, 1)
    visible = gate.detectable(values.seeds, num_candidates)
    summary: dict[str, Any] = {
        "runs": len(planned.runs),
        "packs": len(pack_arms(planned.plan.arms, values.pack)),
        "FLOPs": total,
        "gate": gate.speedup,
        "smallest_visible_nats": visible,
        "verdict": sentence_of(gate, values.seeds, num_candidates),
    }
    if values.json:
        print_result(summary | {"list": rows}, is_json=True)
        return
    print_table([_shown(row) for row in rows], "one seed of each arm at each rung")
    print_result({**summary, "FLOPs": short(total)}, is_json=False)


def sentence_of(gate: GateRule, num_seeds: int, num_candidates: int) -> str:
    """Returns which effect a ladder can see, in words."""
    visible = gate.detectable(num_seeds, num_candidates)
    if num_seeds < 2:
        return "with 1 seed nothing can be told apart from noise; give --seeds=3"
    if visible is None:
        return (
            "what this can see is not known: give the noise of differences between seeds, "
            "in nats, as noise in the recipe's gate()"
        )
    of_arms = f", {num_candidates} arms against one" if num_candidates > 1 else ""
    return f"with {num_seeds} seeds{of_arms} this cannot see less than {visible:.3g} nats"


def _row(run: Run, arm: Arm, planned: LadderPlan) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "budget": run.budget,
        "rung": dict(planned.rungs[run.budget][run.arm]),
        "params_active": arm.count.active,
        "params_total": arm.count.total,
        "flops_per_token": arm.count.flops_per_token,
        "tokens": arm.config.train.num_steps
        * arm.config.train.batch_size
        * arm.config.data.seq_len,
        "steps": arm.config.train.num_steps,
        "flops": training_flops(arm.config, arm.count),
    }


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row for readers."""
    rung = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["rung"].items())
    return {
        "arm": row["arm"],
        "budget": short(row["budget"]),
        "active": short(row["params_active"]),
        "parameters": short(row["params_total"]),
        "tokens": short(row["tokens"]),
        "steps": row["steps"],
        "FLOPs": short(row["flops"]),
        "rung": rung,
    }
