"""Tables of `moejax bench`: rows of figures in columns that fit a line, and CSV files."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.cli.tables import print_result, print_table

Row = dict[str, Any]


def print_processes(rows: list[Row], num: int) -> None:
    """Prints a table for each row of `bench_in_processes`, with the spread over processes."""
    for row in rows:
        names = []
        figures = {}
        for name, value in row.items():
            if isinstance(value, str):
                names.append(value)
            elif isinstance(value, dict):
                figures[name] = _spread(value)
        title = f"{', '.join(names)}: median of {num} processes"
        print_result(figures, is_json=False, title=title)


def _spread(figure: dict[str, float]) -> str:
    """Returns a median with the lowest and the highest value."""
    return "{median:,.6g} ({lowest:,.6g} to {highest:,.6g})".format_map(figure)


def print_layers(rows: list[Row], columns: Callable[[Row], Row]) -> None:
    """Prints a table for each layer and direction.

    Args:
      rows: of `bench_layer`, `bench_decode` or `bench_compiled`.
      columns: returns what the table shows of a row, by the names of its columns.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = _layer_title(row)
        groups.setdefault(title, []).append(row)
    for title, group in groups.items():
        shown = [columns(row) for row in group]
        print_table(shown, title=title)


def _layer_title(row: Row) -> str:
    """Returns the sizes of a row's layer, its dtype and its direction."""
    skewed = ", skewed" if row["skewed"] else ""
    direction = row["direction"].replace("_", " and ")
    sizes = "{tokens} tokens, D {d_model}, F {d_expert}, E {num_experts}, K {top_k}".format_map(row)
    return f"{sizes}{skewed}, {row['dtype']}: {direction}"


def layer_columns(row: Row) -> Row:
    """Returns the columns of a timed layer; quartiles are in percent of the median."""
    median = row["ms"]
    low, high = [100 * (quartile / median - 1) for quartile in row["quartiles_ms"]]
    shown: Row = {
        "implementation": row["implementation"],
        "over dense": f"{row['ratio_to_dense']:.2f}",
        "ms": f"{median:.4g}",
        "quart. %": f"{low:+.0f} {high:+.0f}",
    }
    if "ratio_to_reading" in row:
        shown["over reading"] = f"{row['ratio_to_reading']:.2f}"
        shown["GB/s"] = row["gbytes"]
    else:
        shown["GFLOP/s"] = f"{row['gflops']:.0f} ({row['fraction_of_peak_gflops']:.0%})"
        shown["GB/s"] = f"{row['gbytes']:.1f} ({row['fraction_of_peak_gbytes']:.0%})"
    shown["temp. MB"] = round(row["temporary_bytes"] / 1e6, 1)
    return shown


def compiled_columns(row: Row) -> Row:
    """Returns the columns of a compiled layer; it has no figures if the compiler refused it."""
    shown: Row = {
        "implementation": row["implementation"],
        "over ideal": None,
        "GFLOP": None,
        "temp. MB": "",
        "kernels": None,
        "open loops": row["open_loops"],
    }
    if row["flops"] is not None:
        shown["over ideal"] = f"{row['flops_over_ideal']:.3f}"
        shown["GFLOP"] = f"{row['flops'] / 1e9:.1f}"
        shown["temp. MB"] = f"{row['temporary_bytes'] / 1e6:.1f}"
        shown["kernels"] = _kernels(row, ", ") or "XLA's own"
    if not row["fits"]:
        shown["temp. MB"] = f"{shown['temp. MB']} too large".strip()
    return shown


def _kernels(row: Row, separator: str) -> str:
    """Returns how often each kernel is called, as text."""
    calls = (row["kernels"] or {}).items()
    return separator.join(f"{number} {name}" for name, number in calls)


def print_step(row: Row) -> None:
    """Prints the figures of a compiled step, and its collectives."""
    print_result(_step_figures(row), is_json=False)
    if row["collectives"]:
        collectives = [_collective_columns(collective) for collective in row["collectives"]]
        print_table(collectives, title="What a device sends in a step")
        print("GB by the model of a ring; after it what is added if branches are taken every time.")


def _step_figures(row: Row) -> Row:
    axes = [f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1]
    return {
        "target": f"{row['devices']} {row['target']}, {row['topology']}",
        "mesh": ", ".join(axes) or None,
        "tokens of a device": row["tokens_per_device"],
        "fits": "yes" if row["fits"] else "no",
        "GB held at most": _gbytes(row["peak_bytes"]),
        "GB of arguments": _gbytes(row["argument_bytes"]),
        "GB on the wire": _gbytes(row["wire_bytes"]),
        "GB on the wire in branches": _gbytes(row["conditional_wire_bytes"]),
    }


def _gbytes(num_bytes: float | None) -> str | None:
    return None if num_bytes is None else f"{num_bytes / 1e9:.2f}"


def _collective_columns(row: Row) -> Row:
    or_more = " or more" if row["is_open"] else ""
    return {
        "collective": row["kind"],
        "along": f"{row['axis']} ({row['devices']})" if row["axis"] else None,
        "count": f"{row['count']:,}{or_more}",
        "GB": f"{row['bytes'] / 1e9:.2f}",
        "in branches": f"{row['conditional_count']:,}",
        "GB ": f"{row['conditional_bytes'] / 1e9:.2f}",
        "async.": row["asynchronous"],
        "overlap": row["overlapped"],
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes a line for each row; quartiles have columns of their own, and kernels are text."""
    lines = [_flat(row) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]])
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: Row) -> Row:
    flat = dict(row)
    quartiles = flat.pop("quartiles_ms", None)
    if quartiles:
        flat["q25_ms"], flat["q75_ms"] = quartiles
    if flat.get("kernels") is not None:
        flat["kernels"] = _kernels(row, "; ")
    return flat
