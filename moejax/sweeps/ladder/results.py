"""The losses of a ladder that have been measured so far, by arm, rung and seed."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from moejax.sweeps.ladder.directory import Ladder
from moejax.sweeps.ladder.law import Curve
from moejax.sweeps.store.records import read_records
from moejax.sweeps.tables import LOSS, frame_of


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What has been measured of the arms of a ladder.

    Attributes:
      budgets: FLOPs of the rungs, increasing.
      seeds: of the runs.
      loss: of each arm, `[rungs, seeds]`, nats per token of the validation set at the end; NaN
        where a run has not ended, or has ended without a finite loss.
      seconds: of training of each arm, `[rungs, seeds]`; of a pack each has its share.
      params_total: of each arm, `[rungs]`.
      params_active: likewise.
      tokens: trained on, `[rungs]` of each arm.
    """

    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    loss: Mapping[str, Float[np.ndarray, "R S"]]
    seconds: Mapping[str, Float[np.ndarray, "R S"]]
    params_total: Mapping[str, Float[np.ndarray, "R"]]
    params_active: Mapping[str, Float[np.ndarray, "R"]]
    tokens: Mapping[str, Float[np.ndarray, "R"]]

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms."""
        return tuple(self.loss)

    def curve(self, arm: str, rungs: Sequence[int] | None = None) -> Curve:
        """Returns the budgets and mean losses of an arm, at the rungs that have one."""
        return curve_of(self.budgets, self.loss[arm], rungs)

    @property
    def num_missing(self) -> int:
        """Runs without a loss."""
        return int(sum(np.isnan(loss_RS).sum() for loss_RS in self.loss.values()))


def curve_of(
    budgets: Sequence[float], loss_RS: np.ndarray, rungs: Iterable[int] | None = None
) -> Curve:
    """Returns budgets and losses, means over the seeds that have one, of rungs that have any."""
    kept_budgets = []
    kept_losses = []
    for rung in range(len(budgets)) if rungs is None else rungs:
        known = loss_RS[rung][np.isfinite(loss_RS[rung])]
        if known.size:
            kept_budgets.append(budgets[rung])
            kept_losses.append(float(known.mean()))
    return kept_budgets, kept_losses


def measure(ladder: Ladder) -> Measurements:
    """Reads the records of a ladder's runs.

    Raises:
      RecordError: a record is damaged.
    """
    return measurements_of(ladder, read_records(ladder.directory))


def measurements_of(ladder: Ladder, records: pd.DataFrame) -> Measurements:
    """Returns the measurements in a table of records, see `tables.frame_of`."""
    rows = {row["arm"]: row for row in records.to_dict("records")}
    missing = frame_of([{"arm": "none"}]).to_dict("records")[0]
    arms = tuple(ladder.points)
    seeds = tuple(sorted({run.seed for run in ladder.runs}))

    def table(column: str) -> dict[str, np.ndarray]:
        shape = (len(ladder.budgets), len(seeds))
        found = {arm: np.full(shape, math.nan) for arm in arms}
        for run in ladder.runs:
            row = rows.get(run.id, missing)
            if row["status"] == "done":
                place = (ladder.budgets.index(run.budget), seeds.index(run.seed))
                found[run.arm][place] = row.get(column, math.nan)
        return found

    def of_rungs(column: str) -> dict[str, np.ndarray]:
        return {arm: _first_known(table_RS) for arm, table_RS in table(column).items()}

    return Measurements(
        budgets=ladder.budgets,
        seeds=seeds,
        loss=table(LOSS),
        seconds=table("wall_s"),
        params_total=of_rungs("params_total"),
        params_active=of_rungs("params_active"),
        tokens=of_rungs("tokens"),
    )


def _first_known(table_RS: np.ndarray) -> np.ndarray:
    """Returns of each rung the value that its seeds share; NaN where none has ended."""
    values_R = np.full(len(table_RS), math.nan)
    for rung, values_S in enumerate(table_RS):
        known = values_S[np.isfinite(values_S)]
        if known.size:
            values_R[rung] = known[0]
    return values_R
