"""The table of a comparison: how the runs ended, and by how much they differ."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from moejax.inspection import html
from moejax.inspection.figures.axes import seconds_trained
from moejax.inspection.figures.style import short_number
from moejax.inspection.html import Markup
from moejax.inspection.report.page import table
from moejax.inspection.report.training import duration
from moejax.inspection.runs.comparison import Comparison, format_value, or_nan
from moejax.inspection.runs.run import Run
from moejax.inspection.runs.token_keys import comparison_note
from moejax.training.health.speed import MEMORY, MFU, median_speed

MINUS = "\u2212"  # as wide as +, and no place to break a line
MIN_SHARE = 5e-4  # less is 0.0 %
MAX_ACROSS = 5  # runs that are columns; more are rows


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of results.

    Attributes:
      title: what it is, with its unit.
      value: of a run; NaN where it has none.
      show: a value in words; its difference to another has a sign before it.
      is_in_nats: whether it compares only between runs with the same tokens.
    """

    title: str
    value: Callable[[Run], float]
    show: Callable[[float], str]
    is_in_nats: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table with the values of all runs."""

    row: Row
    values: Sequence[float]

    @property
    def cells(self) -> list[Markup | str]:
        """The values in words, with differences to the first below."""
        show = self.row.show
        first, *others = self.values
        cells: list[Markup | str] = [show(first)]
        for value in others:
            minus = _minus(self.row, value, first)
            cells.append(html.render("comparison/value", value=show(value), difference=minus))
        return cells


def results(comparison: Comparison) -> Markup:
    """Returns how each run ended.

    Two runs are columns, next to their difference; more are columns with differences below values;
    many are rows.
    """
    note = other_tokens(comparison)
    lines = _known_lines(comparison, with_nats=not note)
    intro = html.render("comparison/results", note=note)
    labels = list(comparison.runs)
    if len(labels) == 2:
        return intro + _of_two(labels, lines)
    intro += html.paragraph(f"Below a value: its difference to {labels[0]}.")
    if len(labels) <= MAX_ACROSS:
        return intro + _runs_as_columns(labels, lines)
    return intro + _runs_as_rows(labels, lines)


def _runs_as_columns(labels: Sequence[str], lines: Sequence[Line]) -> Markup:
    rows = [[line.row.title, *line.cells] for line in lines]
    return table(["", *labels], rows, "compared")


def _runs_as_rows(labels: Sequence[str], lines: Sequence[Line]) -> Markup:
    head: list[str] = ["run"]
    rows: list[list[Markup | str]] = [[label] for label in labels]
    for line in lines:
        head.append(line.row.title)
        for row, cell in zip(rows, line.cells, strict=True):
            row.append(cell)
    return table(head, rows, "compared")


def _known_lines(comparison: Comparison, *, with_nats: bool) -> list[Line]:
    """Returns the rows of which some run has a value."""
    runs = comparison.runs.values()
    lines = []
    for row in _rows(comparison):
        if row.is_in_nats and not with_nats:
            continue
        values = [row.value(run) for run in runs]
        if not all(map(math.isnan, values)):
            lines.append(Line(row, values))
    return lines


def _of_two(labels: Sequence[str], lines: Sequence[Line]) -> Markup:
    """Returns a table with a column for each of two runs, and one for their difference."""
    one, other = labels
    head = ["", one, other, f"difference: {other} minus {one}"]
    rows = []
    for line in lines:
        row = line.row
        first, second = line.values
        cells = [
            row.title,
            row.show(first),
            row.show(second),
            _minus(row, second, first),
        ]
        rows.append(cells)
    return table(head, rows, "compared")


def _rows(comparison: Comparison) -> list[Row]:
    """Returns what is told of each run, in order."""
    frame = comparison.table
    label_of = {id(run): label for label, run in comparison.runs.items()}

    def of(column: str) -> Callable[[Run], float]:
        """Looks up a column of the comparison's table."""

        def look_up(run: Run) -> float:
            if column not in frame:
                return math.nan
            label = label_of[id(run)]
            return float(frame.at[label, column])

        return look_up

    def in_nats(title: str, column: str) -> Row:
        return Row(f"{title}, nats per token", of(column), format_value, is_in_nats=True)

    return [
        Row("Steps", of("steps"), format_value),
        Row("Parameters", of("parameters"), _count),
        Row("Active parameters of a token", of("active"), _count),
        in_nats("Validation loss", "eval_loss"),
        in_nats("Lowest validation loss", "best_eval_loss"),
        Row("Bits per byte", of("bits_per_byte"), format_value),
        in_nats("Training loss", "train_loss"),
        Row("Training tokens", of("tokens"), _count),
        Row("Training FLOPs", _flops, _count),
        Row("Training time", _seconds, _duration),
        Row("Tokens per second", of("tokens_per_s"), format_value),
        Row("MFU", _mfu, _percent),
        Row("Peak memory, GiB", _peak_memory, format_value),
        Row("MaxVio in training", of("max_violation"), format_value),
        Row("MaxVio on the validation split", of("eval_max_violation"), format_value),
        Row("Dead experts", of("dead_experts"), format_value),
        Row("Dropped, share of assignments", of("dropped"), format_value),
        Row("Router entropy, nats", of("entropy"), format_value),
    ]


def _flops(run: Run) -> float:
    if run.flops_per_token is None:
        return math.nan
    return or_nan(run.last("tokens")) * run.flops_per_token


def _seconds(run: Run) -> float:
    _, seconds = seconds_trained(run.series)
    return float(seconds[-1]) if seconds.size else math.nan


def _mfu(run: Run) -> float:
    _, mfu = run.series(MFU)
    return or_nan(median_speed(mfu))


def _peak_memory(run: Run) -> float:
    num_bytes = or_nan(run.last(MEMORY))
    return num_bytes / 2**30


def _count(value: float) -> str:
    return "" if math.isnan(value) else short_number(value)


def _duration(value: float) -> str:
    return "" if math.isnan(value) else duration(value)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _minus(row: Row, value: float, other: float) -> str:
    """Returns a difference with its sign, and as a share of what it is a difference to.

    Empty where there is none.
    """
    if not math.isfinite(value) or not math.isfinite(other) or value == other:
        return ""
    change = value - other
    sign = "+" if change > 0 else MINUS
    size = row.show(abs(change))
    said = f"{sign}{size}"
    share = change / abs(other) if other else 0.0
    if abs(share) >= MIN_SHARE:
        said += f" ({share:+.1%})"
    return said.replace("-", MINUS)


def other_tokens(comparison: Comparison) -> Markup:
    """Says why losses in nats per token are left out; nothing where all have the same tokens."""
    note = comparison_note(map(str, comparison.differences.index))
    return html.paragraph(note, "warning")
