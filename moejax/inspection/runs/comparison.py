"""Runs side by side: how they ended, in which leaves of their configurations they differ, and any metric over time."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.inspection import html
from moejax.inspection.runs.names import arm_name
from moejax.inspection.runs.run import Run, RunError, open_run
from moejax.training.health.speed import SPEED, median_speed

if TYPE_CHECKING:  # imported where it is needed
    import pandas as pd


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if math.isfinite(values[-1]) else math.inf


def _finite(values: np.ndarray, summarise: Callable[[np.ndarray], Any]) -> float:
    values = values[np.isfinite(values)]
    return float(summarise(values)) if values.size else math.nan


def or_nan(value: float | None) -> float:
    """The value, or NaN for none."""
    return math.nan if value is None else value


COLUMNS: Mapping[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "eval_loss": ("eval/loss", _last),
    "best_eval_loss": ("eval/loss", lambda values: _finite(values, np.min)),
    "bits_per_byte": ("eval/bits_per_byte", _last),
    "train_loss": ("loss/lm", _last),
    "tokens": ("tokens", _last),
    "tokens_per_s": (SPEED, lambda values: or_nan(median_speed(values))),
    "max_violation": ("moe/max_violation", _last),
    "eval_max_violation": ("eval/max_violation", _last),
    "dead_experts": ("moe/dead_experts", _last),
    "dropped": ("moe/dropped", _last),
    "entropy": ("moe/entropy", _last),
}
"""Columns of the table: the metric that each comes from, and what is made of its values."""


class Comparison:
    """Several runs; nothing of them but their configurations is read before it is asked for.

    Args:
      runs: by label.
    """

    def __init__(self, runs: Mapping[str, Run]):
        self.runs = dict(runs)

    @functools.cached_property
    def table(self) -> "pd.DataFrame":
        """A row per run with what it logged; NaN where it did not, and no column for what none logged.

        Columns are `steps` done, `parameters` (all, and those `active` for a token) and those of
        `COLUMNS`: the last value, inf if that was not finite; the lowest of `best_eval_loss`, and
        the median of `tokens_per_s`.
        """
        import pandas as pd

        rows = {label: _summary(run) for label, run in self.runs.items()}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")
        return table.dropna(axis="columns", how="all")

    @functools.cached_property
    def differences(self) -> "pd.DataFrame":
        """A row for each leaf of the configuration, such as `moe.top_k`, in which runs differ; a column per run.

        None where a run has no such leaf.
        """
        import pandas as pd

        leaves = {label: _leaves(run) for label, run in self.runs.items()}
        keys = dict.fromkeys(key for of_run in leaves.values() for key in of_run)
        rows = {key: [of_run.get(key) for of_run in leaves.values()] for key in keys}
        differing = {
            key: values
            for key, values in rows.items()
            if any(value != values[0] for value in values)
        }
        return pd.DataFrame(
            list(differing.values()), index=pd.Index(differing, name="leaf", dtype=object), columns=list(self.runs),
            dtype=object,
        )  # fmt: skip

    def series(self, key: str) -> "pd.DataFrame":
        """One metric over time: a row per step, a column per run; NaN where a run has no value of that step.

        Args:
          key: a metric name such as `loss/lm` or `eval/loss`.

        Raises:
          RunError: no run has the metric.
        """
        import pandas as pd

        if not any(key in run.keys for run in self.runs.values()):
            known = sorted({known for run in self.runs.values() for known in run.keys})
            raise RunError(f"no run logged {key!r}; use one of {', '.join(known)}")
        columns = {}
        for label, run in self.runs.items():
            steps, values = run.series(key)
            columns[label] = pd.Series(values, index=steps)
        return pd.DataFrame(columns).rename_axis("step")

    def __repr__(self) -> str:
        import pandas as pd

        with pd.option_context(
            "display.width", 100, "display.max_columns", None, "display.precision", 4
        ):
            return f"{self._title}\n{self.table}"

    def _repr_html_(self) -> str:
        table, differences = self.table, self.differences
        parts = [f"<p>{html.text(self._title)}</p>", _as_html("run", table)]
        if len(differences):
            parts += ["<p>Where their configurations differ:</p>", _as_html("leaf", differences)]
        return f"<div>{''.join(parts)}</div>"

    @property
    def _title(self) -> str:
        return f"{len(self.runs)} runs, which differ in {len(self.differences)} leaves of their configurations"


def compare(runs: Sequence[Run | str | Path]) -> Comparison:
    """Puts runs side by side.

    Args:
      runs: runs or their directories. Arms of a sweep are named by what sets them apart, others by
        their directories; of equal names, as many parent folders are added as tell them apart.

    Raises:
      RunError: no run, one given twice, or a directory that is none.
    """
    if isinstance(runs, str) or not runs:
        raise RunError(f"runs={runs!r} must be a list of at least one run or run directory")
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    paths = [run.workdir.resolve() for run in opened]
    for path in paths:
        if paths.count(path) > 1:
            raise RunError(f"{path} is given twice; leave one out")
    arms = [arm_name(path) for path in paths]
    labels = [
        arm if arm and arms.count(arm) == 1 else _label(path, paths)
        for arm, path in zip(arms, paths, strict=True)
    ]
    return Comparison(dict(zip(labels, opened, strict=True)))


def _label(path: Path, paths: Sequence[Path]) -> str:
    """The shortest end of a path that none of the others has."""
    depths = range(1, len(path.parts) + 1)
    ends = (path.parts[-depth:] for depth in depths)
    return "/".join(
        next(end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
    )


def _summary(run: Run) -> dict[str, float]:
    row: dict[str, float] = {}
    for column, (key, summarise) in COLUMNS.items():
        _, values = run.series(key)
        row[column] = summarise(values) if values.size else math.nan
    steps = {
        "steps": run.last_step,
        "parameters": run.parameters_total,
        "active": run.parameters_active,
    }
    return steps | row


def _leaves(run: Run) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, leaves in run.config.items()
        for name, value in leaves.items()
    }


def _as_html(what: str, frame: "pd.DataFrame") -> str:
    rows = zip(frame.index, frame.itertuples(index=False, name=None), strict=True)
    return html.table(
        [what, *frame.columns], [[name, *map(format_value, values)] for name, values in rows]
    )


def format_value(value: Any) -> str:
    """A number in four digits, or all of them before the point; nothing for NaN; other values as they are."""
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if not math.isfinite(value):
        return "" if math.isnan(value) else "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
