"""Tables of a comparison: differences of settings over the seeds that they share."""

import math
from collections.abc import Mapping, Sequence

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.html import Markup
from moejax.inspection.report.comparison_tables import MINUS, other_tokens
from moejax.inspection.report.page import table
from moejax.inspection.runs.comparison import COLUMNS, Comparison, format_value
from moejax.inspection.runs.run import Run
from moejax.inspection.runs.seed_pairs import Setting, difference, find_settings

SEEDED: tuple[tuple[str, str], ...] = (
    ("eval_loss", "Validation loss, nats per token"),
    ("bits_per_byte", "Bits per byte"),
    ("train_loss", "Training loss, nats per token"),
    ("max_violation", "MaxVio in training"),
    ("eval_max_violation", "MaxVio on the validation split"),
)
"""Columns of `Comparison.table` that a seed changes."""

IN_NATS = ("eval_loss", "train_loss")
NO_SHARED_SEEDS = (
    "No two settings share two seeds, so how much of a difference is chance is unknown. Train "
    "each setting with several, the same ones (train.seed), and compare all of the runs."
)


def over_seeds(comparison: Comparison) -> Markup:
    """Returns differences of settings over the seeds that they share, with standard errors."""
    first, *others = find_settings(comparison.runs)
    if not others:
        intro = html.paragraph(f"The runs are one setting with {len(first.runs)} seeds.")
        return intro + _spread(comparison, first) + _unfinished(comparison, [first])
    paired = []
    unpaired = []
    for setting in others:
        if len(_shared_seeds(first, setting)) > 1:
            paired.append(setting)
        else:
            unpaired.append(setting.name)
    if not paired:
        return html.paragraph(NO_SHARED_SEEDS)
    tables = [_pair(comparison, first, setting, len(paired)) for setting in paired]
    return html.render(
        "comparison/seeds",
        tables=html.join(tables),
        first=first.name,
        unpaired=unpaired,
        unfinished=_unfinished(comparison, [first, *paired]),
    )


def _shared_seeds(first: Setting, second: Setting) -> set[int]:
    return first.runs.keys() & second.runs.keys()


def _pair(comparison: Comparison, first: Setting, second: Setting, num_looks: int) -> Markup:
    """Returns a table of the means of two settings and of their difference."""
    num_shared = len(_shared_seeds(first, second))
    rows = []
    for column, title in _seeded(comparison):
        ones = _by_seed(comparison, first, column)
        others = _by_seed(comparison, second, column)
        found = difference(ones, others, num_looks)
        if found.num_seeds < 2:
            continue
        common = ones.keys() & others.keys()
        verdict = "told apart from noise" if found.is_told_apart else "may be noise"
        if len(common) < num_shared:
            verdict = "none: seeds are left out"
        row = [
            title,
            _mean_in_words(ones, common),
            _mean_in_words(others, common),
            _in_words(found),
            str(found.num_seeds),
            verdict,
        ]
        rows.append(row)
    if not rows:
        return html.paragraph(f"{first.name} and {second.name} logged nothing in common.")
    head = ("mean", first.name, second.name, "second minus first", "seeds", "")
    return table(head, rows, "compared")


def _mean_in_words(values: Mapping[int, float], seeds: set[int]) -> str:
    total = sum(values[seed] for seed in seeds)
    return format_value(total / len(seeds))


def _in_words(found: Difference) -> str:
    return f"{found.mean:+.3g} ± {found.se:.2g}".replace("-", MINUS)


def _spread(comparison: Comparison, setting: Setting) -> Markup:
    """Returns means over seeds with their standard deviation: less is no difference."""
    rows = []
    for column, title in _seeded(comparison):
        by_seed = _by_seed(comparison, setting, column)
        if len(by_seed) > 1:
            mean, deviation = _mean_and_deviation(list(by_seed.values()))
            rows.append([title, format_value(mean), f"{deviation:.2g}"])
    if not rows:
        return html.EMPTY
    head = ("", "mean", "standard deviation over seeds")
    return table(head, rows, "compared")


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample's standard deviation of at least two values."""
    num_values = len(values)
    mean = sum(values) / num_values
    squares = 0.0
    for value in values:
        squares += (value - mean) ** 2
    variance = squares / (num_values - 1)
    return mean, math.sqrt(variance)


def _seeded(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns the columns of `SEEDED` that the runs have and can be compared by."""
    left_out = IN_NATS if other_tokens(comparison) else ()
    found = []
    for column, title in SEEDED:
        is_known = column in comparison.table
        if is_known and column not in left_out:
            found.append((column, title))
    return found


def _by_seed(comparison: Comparison, setting: Setting, column: str) -> Mapping[int, float]:
    """Returns finite values of a column by seed, of runs that have one at their last step."""
    key, _ = COLUMNS[column]
    found = {}
    for seed, label in setting.runs.items():
        value = _at_end(comparison.runs[label], key)
        if math.isfinite(value):
            found[seed] = value
    return found


def _at_end(run: Run, key: str) -> float:
    """Returns the value of a metric at the step at which the run is to end.

    NaN if it has none there, or the run has not come so far.
    """
    steps, values = run.series(key)
    if not steps.size:
        return math.nan
    last_step = steps[-1]
    # Runs of earlier versions have no `train.num_steps`.
    train = run.config.get("train", {})
    num_steps = train.get("num_steps", last_step)
    if last_step != num_steps:
        return math.nan
    return float(values[-1])


def _unfinished(comparison: Comparison, settings: Sequence[Setting]) -> Markup:
    """Says which runs lack a value of their last step: the others may be the lucky ones."""
    columns = [column for column, _ in _seeded(comparison)]
    found = []
    for setting in settings:
        for seed, label in setting.runs.items():
            if any(_is_missing(comparison, setting, seed, column) for column in columns):
                found.append(label)
    if not found:
        return html.EMPTY
    note = (
        f"Left out, for they have no finite value at their last step: {', '.join(found)}. "
        "What is left may be the lucky ones."
    )
    return html.paragraph(note, "warning")


def _is_missing(comparison: Comparison, setting: Setting, seed: int, column: str) -> bool:
    """Returns whether a run lacks at its end what a run of its setting has logged at some time."""
    key, _ = COLUMNS[column]
    is_logged = any(key in comparison.runs[label].keys for label in setting.runs.values())
    return is_logged and seed not in _by_seed(comparison, setting, column)
