"""Compares runs: how they ended, in which configuration leaves they differ, metrics over time."""

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
    """Returns the last value, inf if it is not finite: a run that diverged is no missing value."""
    last = float(values[-1])
    return last if math.isfinite(last) else math.inf


def _lowest(values: np.ndarray) -> float:
    """Returns the lowest finite value, NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else math.nan


def _median_speed(values: np.ndarray) -> float:
    return or_nan(median_speed(values))


def or_nan(value: float | None) -> float:
    """Returns the value, or NaN for none."""
    return math.nan if value is None else value


COLUMNS: Mapping[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "eval_loss": ("eval/loss", _last),
    "best_eval_loss": ("eval/loss", _lowest),
    "bits_per_byte": ("eval/bits_per_byte", _last),
    "train_loss": ("loss/lm", _last),
    "tokens": ("tokens", _last),
    "tokens_per_s": (SPEED, _median_speed),
    "max_violation": ("moe/max_violation", _last),
    "eval_max_violation": ("eval/max_violation", _last),
    "dead_experts": ("moe/dead_experts", _last),
    "dropped": ("moe/dropped", _last),
    "entropy": ("moe/entropy", _last),
}
"""Columns of the table: the metric that each comes from, and the summary of its values."""


class Comparison:
    """Several runs, of which only the configurations are read before more is asked for.

    Args:
      runs: by label.
    """

    def __init__(self, runs: Mapping[str, Run]):
        self.runs = dict(runs)

    @functools.cached_property
    def table(self) -> "pd.DataFrame":
        """A row per run; NaN where it logged nothing, and no column for what no run logged.

        Columns are `steps` done, `parameters` (all, and those `active` for a token) and those of
        `COLUMNS`: the last value, inf if that was not finite; the lowest of `best_eval_loss`, and
        the median of `tokens_per_s`.
        """
        import pandas as pd

        rows = {label: _summary(run) for label, run in self.runs.items()}
        table = pd.DataFrame.from_dict(rows, orient="index")
        table = table.rename_axis("run")
        return table.dropna(axis="columns", how="all")

    @functools.cached_property
    def differences(self) -> "pd.DataFrame":
        """A row for each leaf of the configuration in which runs differ, and a column per run.

        A leaf is named as `moe.top_k`. None where a run has no such leaf.
        """
        import pandas as pd

        leaves_of_runs = [_leaves(run) for run in self.runs.values()]
        keys: dict[str, None] = {}  # a set that keeps the order
        for leaves in leaves_of_runs:
            keys |= dict.fromkeys(leaves)
        differing = {}
        for key in keys:
            values = [leaves.get(key) for leaves in leaves_of_runs]
            if any(value != values[0] for value in values):
                differing[key] = values
        return pd.DataFrame(
            list(differing.values()),
            index=pd.Index(differing, name="leaf", dtype=object),
            columns=list(self.runs),
            dtype=object,
        )

    def series(self, key: str) -> "pd.DataFrame":
        """Returns one metric over time: a row per step, and a column per run.

        NaN where a run has no value of that step.

        Args:
          key: a metric name such as `loss/lm` or `eval/loss`.

        Raises:
          RunError: no run has the metric.
        """
        import pandas as pd

        self._check_logged(key)
        columns = {}
        for label, run in self.runs.items():
            steps, values = run.series(key)
            columns[label] = pd.Series(values, index=steps)
        table = pd.DataFrame(columns)
        return table.rename_axis("step")

    def _check_logged(self, key: str) -> None:
        """Raises `RunError` if no run has the metric."""
        known: set[str] = set()
        for run in self.runs.values():
            known.update(run.keys)
        if key not in known:
            listed = ", ".join(sorted(known))
            raise RunError(f"no run logged {key!r}; use one of {listed}")

    def __repr__(self) -> str:
        import pandas as pd

        with pd.option_context(
            "display.width", 100, "display.max_columns", None, "display.precision", 4
        ):
            return f"{self._title}\n{self.table}"

    def _repr_html_(self) -> str:
        title = html.text(self._title)
        parts = [f"<p>{title}</p>", _as_html("run", self.table)]
        differences = self.differences
        if len(differences):
            parts.append("<p>Where their configurations differ:</p>")
            parts.append(_as_html("leaf", differences))
        content = "".join(parts)
        return f"<div>{content}</div>"

    @property
    def _title(self) -> str:
        num_leaves = len(self.differences)
        return f"{len(self.runs)} runs, which differ in {num_leaves} leaves of their configurations"


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
    labels = _labels(paths)
    by_label = dict(zip(labels, opened, strict=True))
    return Comparison(by_label)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Returns a different label for each run: the arm's name where there is one, else folders."""
    arms = [arm_name(path) for path in paths]
    labels = []
    for path, arm in zip(paths, arms, strict=True):
        is_clear = arm and arms.count(arm) == 1
        label = arm if is_clear else _shortest_end(path, paths)
        labels.append(label)
    return labels


def _shortest_end(path: Path, paths: Sequence[Path]) -> str:
    """Returns the shortest end of a path that none of the others has, or all of it."""
    num_parts = len(path.parts)
    for depth in range(1, num_parts + 1):
        end = path.parts[-depth:]
        ends = [other.parts[-depth:] for other in paths]
        if ends.count(end) == 1:
            return "/".join(end)
    return str(path)


def _summary(run: Run) -> dict[str, float]:
    row: dict[str, float] = {
        "steps": run.last_step,
        "parameters": run.parameters_total,
        "active": run.parameters_active,
    }
    for column, (key, summarise) in COLUMNS.items():
        _, values = run.series(key)
        row[column] = summarise(values) if values.size else math.nan
    return row


def _leaves(run: Run) -> dict[str, Any]:
    """Returns the values of all leaves by dotted key."""
    found = {}
    for section, leaves in run.config.items():
        for name, value in leaves.items():
            key = f"{section}.{name}"
            found[key] = value
    return found


def _as_html(first_column: str, frame: "pd.DataFrame") -> str:
    rows = []
    for name, *values in frame.itertuples(name=None):
        cells = map(format_value, values)
        rows.append([name, *cells])
    head = [first_column, *frame.columns]
    return html.table(head, rows)


def format_value(value: Any) -> str:
    """Returns a number in four digits, or with all digits before the point.

    Empty for NaN; other values as they are.
    """
    if type(value) is int:
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "not finite"
    has_four_digits = abs(value) >= 1000  # before the point
    return f"{value:,.0f}" if has_four_digits else f"{value:.4g}"
