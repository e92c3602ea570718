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
    settings = find_settings(comparison.runs)
    first, others = settings[0], settings[1:]
    if not others:
        intro = html.paragraph(f"The runs are one setting with {len(first.runs)} seeds.")
        return intro + _spread(comparison, first) + _unfinished(comparison, [first])
    paired = [setting for setting in others if len(setting.runs.keys() & first.runs.keys()) > 1]
    if not paired:
        return html.paragraph(NO_SHARED_SEEDS)
    tables = [_pair(comparison, first, setting, len(paired)) for setting in paired]
    return html.render(
        "comparison/seeds",
        tables=html.join(tables),
        first=first.name,
        unpaired=[setting.name for setting in others if setting not in paired],
        unfinished=_unfinished(comparison, [first, *paired]),
    )


def _pair(comparison: Comparison, first: Setting, second: Setting, num_looks: int) -> Markup:
    num_shared = len(first.runs.keys() & second.runs.keys())
    rows = []
    for column, title in _seeded(comparison):
        ones = _by_seed(comparison, first, column)
        others = _by_seed(comparison, second, column)
        found = difference(ones, others, num_looks)
        if found.num_seeds < 2:
            continue
        common = ones.keys() & others.keys()
        means = [_mean_in_words(values, common) for values in (ones, others)]
        verdict = "told apart from noise" if found.is_told_apart else "may be noise"
        if len(common) < num_shared:
            verdict = "none: seeds are left out"
        rows.append([title, *means, _in_words(found), str(found.num_seeds), verdict])
    if not rows:
        return html.paragraph(f"{first.name} and {second.name} logged nothing in common.")
    head = ("mean", first.name, second.name, "second minus first", "seeds", "")
    return table(head, rows, "compared")


def _mean_in_words(values: Mapping[int, float], seeds: set[int]) -> str:
    return format_value(sum(values[seed] for seed in seeds) / len(seeds))


def _in_words(found: Difference) -> str:
    return f"{found.mean:+.3g} ± {found.se:.2g}".replace("-", MINUS)


def _spread(comparison: Comparison, setting: Setting) -> Markup:
    """Returns means over seeds with their standard deviation: less is no difference."""
    rows = []
    for column, title in _seeded(comparison):
        values = list(_by_seed(comparison, setting, column).values())
        if len(values) > 1:
            mean = sum(values) / len(values)
            squares = sum((value - mean) ** 2 for value in values)
            deviation = math.sqrt(squares / (len(values) - 1))
            rows.append([title, format_value(mean), f"{deviation:.2g}"])
    if not rows:
        return html.EMPTY
    return table(("", "mean", "standard deviation over seeds"), rows, "compared")


def _seeded(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns the columns of `SEEDED` that the runs have and can be compared by."""
    left_out = IN_NATS if other_tokens(comparison) else ()
    known = [column for column, _ in SEEDED if column in comparison.table]
    return [
        (column, title) for column, title in SEEDED if column in known and column not in left_out
    ]


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
    # Runs of earlier versions have no `train.num_steps`.
    num_steps = run.config.get("train", {}).get("num_steps", steps[-1])
    return float(values[-1]) if steps[-1] == num_steps else math.nan


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
