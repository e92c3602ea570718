"""Prints results as a table, or as one JSON document."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.cli.printable import printable
from moejax.config import Config
from moejax.inspection.counterfactuals.result import Counterfactuals
from moejax.models.parameters import ParameterCount
from moejax.strict_json import to_json
from moejax.training.evaluation import Evaluation
from moejax.training.run import TrainResult


def print_result(rows: Mapping[str, Any], *, is_json: bool, title: str = "") -> None:
    """Prints names and values.

    Args:
      rows: values are numbers, strings, lists of numbers or None; None is shown as "-".
      is_json: print one JSON document with the same keys and nothing else.
      title: above the table.
    """
    if is_json:
        print(to_json(rows, indent=2))
        return
    table = Table(title=title or None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        # As `Text`, since rich reads [brackets] in a string as markup.
        table.add_row(Text(name), Text(_show(value)))
    Console().print(table)


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints rows with the same keys, below a title and the names of their columns.

    The first column holds names, and the others figures.
    """
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        cells = [Text(_show(value)) for value in row.values()]
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for every column
        measured = Console(width=10_000).measure(table).maximum
        padding = 2 * len(rows[0])  # of which not all is measured
        console = Console(width=max(console.width, measured + padding))
    console.print(table)


def print_counterfactuals(result: Counterfactuals) -> None:
    """Prints the outcomes of all changes; of ablations the mean and the extremes of each layer."""
    print_table(_rows(result), result.title())
    if result.of_kind("ablate"):
        print_table(
            result.summary(),
            "Without one expert: change of the loss over a layer's experts, and by which",
        )
    for what, reason in result.left_out.items():
        Console().print(Text(f"left out: {what}: {reason}"))


def _rows(result: Counterfactuals) -> list[dict[str, str]]:
    """Returns all outcomes but those of ablations, in the width of a line."""
    return [_columns(row) for row in result.table() if row["kind"] != "ablate"]


def _columns(row: dict[str, str]) -> dict[str, str]:
    what = row["what"]
    if row["kind"] in ("swap", "merge"):
        what = f"{row['kind']} {what}"
    change = f"{row['change']} ± {row['standard error']}" if row["change"] else ""
    return {
        "what": what,
        "layer": row["layer"],
        "experts": row["experts"],
        "change": change,
        "loss": row["loss"],
        "mass": row["gate mass"],
        "dropped": row["dropped"],
    }


def summary_rows(
    config: Config,
    parameters: ParameterCount,
    result: TrainResult,
    report: Path | None,
) -> dict[str, Any]:
    """Returns what `moejax train` prints at the end."""
    rows: dict[str, Any] = {
        "steps": result.step,
        "parameters, total": parameters.total,
        "parameters, active": parameters.active,
    }
    if result.evaluation:
        rows |= evaluation_rows(config, result.evaluation)
    speed = result.tokens_per_s
    rows["tokens/s"] = None if speed is None else round(speed)
    rows["report"] = None if report is None else str(report)
    return rows


def evaluation_rows(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the validation figures, and the load of the experts of each MoE layer.

    Loads are in multiples of that of perfect balance.
    """
    rows: dict[str, Any] = {
        "validation loss": round(evaluation.loss, 4),
        "perplexity": round(evaluation.perplexity, 2),
        "bits per byte": round(evaluation.bits_per_byte, 4),
    }
    for domain, loss in evaluation.loss_by_domain.items():
        rows[f"validation loss, {domain}"] = round(loss, 4)
    if evaluation.load_NE is not None:
        num_experts = evaluation.load_NE.shape[1]
        for layer, load_E in zip(config.moe_layers, evaluation.load_NE, strict=True):
            relative_loads = [round(float(load) * num_experts, 2) for load in load_E]
            rows[f"expert load, layer {layer}"] = relative_loads
    return rows


def _show(value: Any) -> str:
    """Returns a value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return printable(str(value))
