"""What a ladder's directory holds besides that of a sweep: `ladder.json`.

A ladder is a sweep, whose `sweep.json`, run directories, locks and records it has. `ladder.json`
says which of the sweep's arms is which arm of the ladder at which rung.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.paths import resolve_path
from moejax.sweeps.arms import SweepError
from moejax.sweeps.ladder.gates import GateRule
from moejax.sweeps.ladder.plan import LadderPlan, Point, Run
from moejax.sweeps.store.directory import Sweep, locked
from moejax.sweeps.store.record_files import check_inside, read_text
from moejax.training.run_directory.layout import write_json

LADDER_FILE = "ladder.json"


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A planned ladder.

    Attributes:
      directory: where it is kept.
      budgets: FLOPs of the rungs, increasing.
      points: what each arm sets, by name.
      rungs: what the rule sets, by budget and arm, budgets as `repr` writes them.
      runs: of every arm at every rung with every seed.
      gate: what a candidate must reach.
    """

    directory: Path
    budgets: tuple[float, ...]
    points: Mapping[str, Point]
    rungs: Mapping[str, Mapping[str, Point]]
    runs: tuple[Run, ...]
    gate: GateRule

    @property
    def num_seeds(self) -> int:
        """The number of seeds of each arm at each rung."""
        return len({run.seed for run in self.runs})


def write_ladder(sweep: Sweep, planned: LadderPlan, gate: GateRule) -> Ladder:
    """Writes which of a sweep's arms is which run of a ladder, once the sweep is written."""
    id_of = {}
    for arm, recorded in zip(planned.plan.arms, sweep.arms.values(), strict=True):
        # A directory keeps the ids with which its arms were recorded.
        id_of[arm.id] = recorded.id
    runs = [dataclasses.replace(run, id=id_of[run.id]) for run in planned.runs]
    rungs = {repr(budget): of_arms for budget, of_arms in planned.rungs.items()}
    content = {
        "budgets": list(planned.rungs),
        "points": {name: dict(point) for name, point in planned.points.items()},
        "rungs": rungs,
        "runs": [dataclasses.asdict(run) for run in runs],
        "gate": dataclasses.asdict(gate),
    }
    with locked(sweep.directory, "ladder"):
        write_json(sweep.directory / LADDER_FILE, content)
    return open_ladder(sweep.directory)


def open_ladder(directory: str | Path) -> Ladder:
    """Returns a ladder that was planned.

    Raises:
      SweepError: the directory holds none, or one that is damaged.
    """
    directory = resolve_path(directory)
    check_inside(directory)
    path = directory / LADDER_FILE
    if not path.is_file():
        raise SweepError(
            f"{path} does not exist; name a folder that moejax ladder --dir made, or run that "
            "command again"
        )
    try:
        return _ladder_of(directory, json.loads(read_text(path)))
    except (KeyError, TypeError, ValueError) as error:
        raise SweepError(
            f"{path} is damaged ({error}); the command that made it writes it again"
        ) from error


def _ladder_of(directory: Path, content: Mapping[str, Any]) -> Ladder:
    return Ladder(
        directory=directory,
        budgets=tuple(map(float, content["budgets"])),
        points={str(name): dict(point) for name, point in content["points"].items()},
        rungs=content["rungs"],
        runs=tuple(Run(**run) for run in content["runs"]),
        gate=GateRule(**content["gate"]),
    )
