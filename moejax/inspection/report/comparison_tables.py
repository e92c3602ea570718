"""Tables of a comparison: how the runs ended with their differences, and differences of settings over seeds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.figures.axes import seconds_trained
from moejax.inspection.figures.style import short_number
from moejax.inspection.report.page import table
from moejax.inspection.report.training import duration
from moejax.inspection.runs.comparison import COLUMNS, Comparison, format_value, or_nan
from moejax.inspection.runs.run import Run
from moejax.inspection.runs.seed_pairs import Setting, difference, find_settings
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


def results(comparison: Comparison) -> str:
    """How each run ended: runs as columns beside their differences, or as rows if there are many."""
    note = other_tokens(comparison)
    known: list[tuple[Row, list[float]]] = []
    for row in _rows(comparison):
        values = [row.value(run) for run in comparison.runs.values()]
        if not all(math.isnan(value) for value in values) and not (note and row.is_in_nats):
            known.append((row, values))
    intro = f"<p>The last value of each run; tokens per second and MFU are medians over logging intervals.</p>{note}"
    labels = [html.text(label) for label in comparison.runs]
    if len(labels) == 2:
        head = ["", *labels, f"difference: {labels[1]} minus {labels[0]}"]
        rows = [
            [row.title, *map(row.show, values), _minus(row, values[1], values[0])]
            for row, values in known
        ]
        return intro + table(head, rows, "compared")
    titles = [row.title for row, _ in known]
    by_title = [[row.show(values[0]), *_with_differences(row, values)] for row, values in known]
    intro += f"<p>Below a value: its difference to {labels[0]}.</p>"
    if len(labels) > MAX_ACROSS:
        rows = [[label, *(cells[i] for cells in by_title)] for i, label in enumerate(labels)]
        return intro + table(["run", *titles], rows, "compared")
    rows = [[title, *cells] for title, cells in zip(titles, by_title, strict=True)]
    return intro + table(["", *labels], rows, "compared")


def _rows(comparison: Comparison) -> list[Row]:
    frame = comparison.table
    label_of = {id(run): label for label, run in comparison.runs.items()}

    def of(column: str) -> Callable[[Run], float]:
        return lambda run: (
            float(frame.at[label_of[id(run)], column]) if column in frame else math.nan
        )

    return [
        Row("Steps", of("steps"), format_value),
        Row("Parameters", of("parameters"), _count),
        Row("Active parameters of a token", of("active"), _count),
        Row("Validation loss, nats per token", of("eval_loss"), format_value, is_in_nats=True),
        Row(
            "Lowest validation loss, nats per token",
            of("best_eval_loss"),
            format_value,
            is_in_nats=True,
        ),
        Row("Bits per byte", of("bits_per_byte"), format_value),
        Row("Training loss, nats per token", of("train_loss"), format_value, is_in_nats=True),
        Row("Training tokens", of("tokens"), _count),
        Row("Training FLOPs", _flops, _count),
        Row("Training time", _seconds, _duration),
        Row("Tokens per second", of("tokens_per_s"), format_value),
        Row("MFU", lambda run: or_nan(median_speed(run.series(MFU)[1])), _percent),
        Row("Peak memory, GiB", lambda run: or_nan(run.last(MEMORY)) / 2**30, format_value),
        Row("MaxVio in training", of("max_violation"), format_value),
        Row("MaxVio on the validation split", of("eval_max_violation"), format_value),
        Row("Dead experts", of("dead_experts"), format_value),
        Row("Dropped, share of assignments", of("dropped"), format_value),
        Row("Router entropy, nats", of("entropy"), format_value),
    ]


def _flops(run: Run) -> float:
    return (
        math.nan
        if run.flops_per_token is None
        else or_nan(run.last("tokens")) * run.flops_per_token
    )


def _seconds(run: Run) -> float:
    _, seconds = seconds_trained(run.series)
    return float(seconds[-1]) if seconds.size else math.nan


def _count(value: float) -> str:
    return "" if math.isnan(value) else short_number(value)


def _duration(value: float) -> str:
    return "" if math.isnan(value) else duration(value)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _minus(row: Row, value: float, other: float) -> str:
    """A difference with its sign, and as a share of what it is a difference to; empty where there is none."""
    if not math.isfinite(value) or not math.isfinite(other) or value == other:
        return ""
    change = value - other
    share = change / abs(other) if other else 0.0
    percent = f" ({share:+.1%})" if abs(share) >= MIN_SHARE else ""
    return f"{'+' if change > 0 else MINUS}{row.show(abs(change))}{percent}".replace("-", MINUS)


def _with_differences(row: Row, values: Sequence[float]) -> list[str]:
    cells = []
    for value in values[1:]:
        minus = _minus(row, value, values[0])
        cells.append(row.show(value) + (f"<span class='default'>{minus}</span>" if minus else ""))
    return cells


SEEDED: tuple[tuple[str, str], ...] = (
    ("eval_loss", "Validation loss, nats per token"),
    ("bits_per_byte", "Bits per byte"),
    ("train_loss", "Training loss, nats per token"),
    ("max_violation", "MaxVio in training"),
    ("eval_max_violation", "MaxVio on the validation split"),
)
"""Columns of `Comparison.table` that a seed changes."""

IN_NATS = ("eval_loss", "train_loss")


def over_seeds(comparison: Comparison) -> str:
    """Differences of settings over the seeds that they share, with standard errors."""
    settings = find_settings(comparison.runs)
    first, others = settings[0], settings[1:]
    if not others:
        return (
            f"<p>The runs are one setting with {len(first.runs)} seeds.</p>{_spread(comparison, first)}"
            f"{_unfinished(comparison, [first])}"
        )
    paired = [setting for setting in others if len(setting.runs.keys() & first.runs.keys()) > 1]
    if not paired:
        return (
            "<p>No two settings share two seeds, so how much of a difference is chance cannot be told. Train each "
            "setting with several, the same ones (train.seed), and compare all of the runs.</p>"
        )
    alone = [html.text(setting.name) for setting in others if setting not in paired]
    unpaired = f"<p>Not compared, for fewer than two seeds in common with {html.text(first.name)}: {', '.join(alone)}.</p>"
    tables = "".join(_pair(comparison, first, setting, len(paired)) for setting in paired)
    explained = (
        "<p class='soft'>Each difference is taken between runs of the same seed, and ± is its standard error over the "
        "seeds. Told apart from noise: 0 is outside of the 95 % interval of Student's t, which is wide for few seeds, "
        "and wider the more settings are compared.</p>"
    )
    return (
        tables + (unpaired if alone else "") + _unfinished(comparison, [first, *paired]) + explained
    )


def _pair(comparison: Comparison, first: Setting, second: Setting, num_looks: int) -> str:
    rows = []
    for column, title in _seeded(comparison):
        ones, others = _by_seed(comparison, first, column), _by_seed(comparison, second, column)
        found = difference(ones, others, num_looks)
        if found.num_seeds < 2:
            continue
        common = ones.keys() & others.keys()
        means = [
            format_value(sum(values[seed] for seed in common) / len(common))
            for values in (ones, others)
        ]
        verdict = "told apart from noise" if found.is_told_apart else "may be noise"
        if len(common) < len(first.runs.keys() & second.runs.keys()):
            verdict = "none: seeds are left out"
        rows.append([title, *means, _in_words(found), str(found.num_seeds), verdict])
    names = [html.text(first.name), html.text(second.name)]
    if not rows:
        return f"<p>{names[0]} and {names[1]} logged nothing in common.</p>"
    head = ("mean", *names, "second minus first", "seeds", "")
    return table(head, rows, "compared")


def _in_words(found: Difference) -> str:
    return f"{found.mean:+.3g} ± {found.se:.2g}".replace("-", MINUS)


def _spread(comparison: Comparison, setting: Setting) -> str:
    """Means over seeds with their standard deviation: what a difference has to be larger than."""
    rows = []
    for column, title in _seeded(comparison):
        values = list(_by_seed(comparison, setting, column).values())
        if len(values) > 1:
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            rows.append([title, format_value(mean), f"{deviation:.2g}"])
    return table(("", "mean", "standard deviation over seeds"), rows, "compared") if rows else ""


def _seeded(comparison: Comparison) -> list[tuple[str, str]]:
    left_out = IN_NATS if other_tokens(comparison) else ()
    return [
        (column, title)
        for column, title in SEEDED
        if column in comparison.table and column not in left_out
    ]


def _by_seed(comparison: Comparison, setting: Setting, column: str) -> Mapping[int, float]:
    """Finite values of a column by seed, of runs that have one at their last step."""
    values = {
        seed: _at_end(comparison.runs[label], COLUMNS[column][0])
        for seed, label in setting.runs.items()
    }
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _at_end(run: Run, key: str) -> float:
    """The value of a metric at the last step of the whole run; NaN if it has none there, or not come so far."""
    steps, values = run.series(key)
    if not steps.size:
        return math.nan
    num_steps = run.config.get("train", {}).get(
        "num_steps", steps[-1]
    )  # absent from runs of earlier versions
    return float(values[-1]) if steps[-1] == num_steps else math.nan


def _unfinished(comparison: Comparison, settings: Sequence[Setting]) -> str:
    """Which runs lack a value of their last step: what is left may be the lucky ones."""
    columns = [column for column, _ in _seeded(comparison)]
    found = [
        label
        for setting in settings
        for seed, label in setting.runs.items()
        if any(_is_missing(comparison, setting, seed, column) for column in columns)
    ]
    if not found:
        return ""
    return (
        f"<p class='warning'>Left out, for they have no finite value at their last step: "
        f"{', '.join(map(html.text, found))}. What is left may be the lucky ones.</p>"
    )


def _is_missing(comparison: Comparison, setting: Setting, seed: int, column: str) -> bool:
    """Whether a run lacks at its end what a run of its setting has logged at some time."""
    key = COLUMNS[column][0]
    is_logged = any(key in comparison.runs[label].keys for label in setting.runs.values())
    return is_logged and seed not in _by_seed(comparison, setting, column)


def other_tokens(comparison: Comparison) -> str:
    """Why losses in nats per token are left out, as HTML; nothing where all runs have the same tokens."""
    note = comparison_note(map(str, comparison.differences.index))
    return f"<p class='warning'>{html.text(note)}</p>" if note else ""
