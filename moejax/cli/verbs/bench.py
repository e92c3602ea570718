"""Measure. Everything is compared within one run: repetitions are interleaved, figures are medians, ratios come first.

moejax bench layer     the experts of a layer over a dense layer with the same active FLOPs, by implementation
moejax bench decode    the same for a few tokens, over reading the weights of the chosen experts once
moejax bench compiled  the experts of a layer compiled for --target: arithmetic over the ideal, memory, kernels
moejax bench compiled_step  the train step of --config compiled for --target and --topology: memory, what travels
moejax bench step      the train step of --config over its dense twin's
moejax bench attention the train step of --config with rows four times as long, and attention over that with all scores
moejax bench generate  decode steps of 16 sequences of --config, by how tokens are drawn
moejax bench start     from the start of `moejax train` to its first step, with compiled programs kept and without
moejax bench telemetry logging intervals of --config with all that is logged over those with their loss alone
moejax bench packed    a sweep over 8 seeds of --config: separate processes and one process over a pack
moejax bench compile   compile time of the train step, 64 over 8 experts and 8 over 2 layers
moejax bench import    importing moejax over importing jax and flax

Without --config, benchmarks of a recipe take configs/tiny_moe.py. Ratios can differ from process to
process by more than within one: --processes=5 runs a benchmark in five and shows the median, the
lowest and the highest.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl.flags import FlagValues

from moejax.benchmarks import decode, layer
from moejax.benchmarks.attention import bench_attention
from moejax.benchmarks.compiled import bench_compiled
from moejax.benchmarks.compiled_step import bench_compiled_step
from moejax.benchmarks.generation import bench_generate
from moejax.benchmarks.packed import bench_packed
from moejax.benchmarks.processes import bench_in_processes
from moejax.benchmarks.start import bench_start
from moejax.benchmarks.step import bench_compile, bench_import, bench_step
from moejax.benchmarks.telemetry import bench_telemetry
from moejax.benchmarks.timing import measure_peaks
from moejax.cli import UsageError
from moejax.cli.options import define_config, define_json, read_config_flag, read_file_to_write
from moejax.cli.tables import print_result, print_table
from moejax.inspection.figures.bench import draw_layers
from moejax.kernels.grouped_matmul import unavailable
from moejax.planning.targets import TARGETS, Target
from moejax.strict_json import to_json

BENCHMARKS = (
    "layer",
    "decode",
    "compiled",
    "compiled_step",
    "step",
    "attention",
    "generate",
    "start",
    "telemetry",
    "packed",
    "compile",
    "import",
)
OF_RECIPES = (
    "compiled_step",
    "step",
    "attention",
    "generate",
    "start",
    "telemetry",
    "packed",
    "compile",
)
"""Benchmarks of a configuration; the others have shapes, or neither."""

IN_PROCESSES = ("layer", "decode", "step", "attention", "generate", "telemetry", "compile")
"""Benchmarks that --processes repeats; the others start processes, or time nothing."""

DEFAULT_RECIPE = "configs/tiny_moe.py"
DEFAULT_SHAPES = {
    "layer": "mixtral,mixtral-64,olmoe,deepseek",
    "compiled": "mixtral,mixtral-64,olmoe,deepseek",
    "decode": "1:512:1024:64:2,16:512:1024:64:2,64:512:1024:64:2",
}


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    reads_recipe = any(word in OF_RECIPES for word in arguments)
    define_config(values, arguments, DEFAULT_RECIPE if reads_recipe else None)
    define_json(values)
    flags.DEFINE_integer(
        "repetitions",
        0,
        "timed repetitions of each side; 0: 15, of layers 4, packed and start 3",
        flag_values=values,
    )
    shapes = (
        f"layer, decode, compiled: some of {', '.join(layer.PRESETS)}, or T:D:F:E:K; :skewed after it gives one "
        "expert half"
    )
    flags.DEFINE_string("shapes", "", f"{shapes}; separated by commas", flag_values=values)
    names = ", ".join(layer.implementations_of(layer.PRESETS["mixtral"]))
    flags.DEFINE_list(
        "implementations", [], f"layer, decode, compiled: some of {names}", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "layer, decode, compiled: of all arrays; by default float32, and bfloat16 for compiled",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "target", None, [*TARGETS], "compiled, compiled_step: the device", flag_values=values
    )
    flags.DEFINE_string(
        "topology",
        "",
        "compiled_step: 4x4x4 chips of a v5p, or 1x8x8 slices, hosts and GPUs",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "processes",
        1,
        f"{', '.join(IN_PROCESSES)}: how many to run, one after the other",
        flag_values=values,
    )
    flags.DEFINE_string(
        "csv", "", "layer, decode, compiled: a file to write the rows to", flag_values=values
    )
    flags.DEFINE_string(
        "plot", "", "layer: a file for a picture of the ratios (.svg)", flag_values=values
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Runs one benchmark and prints its figures."""
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        raise UsageError(
            f"moejax bench takes one of {', '.join(BENCHMARKS)}; got {' '.join(rest) or 'nothing'}"
        )
    if values.repetitions < 0:
        raise UsageError(
            f"--repetitions={values.repetitions} must be at least 0, which stands for the default"
        )
    if values.processes < 1:
        raise UsageError(f"--processes={values.processes} must be at least 1")
    _refuse_flags_of_others(values, rest[0])
    if values.processes > 1:
        return _run_in_processes(values, rest[0])
    if rest[0] == "compiled":
        return _run_compiled(values)
    if rest[0] == "compiled_step":
        return _run_compiled_step(values)
    if rest[0] in DEFAULT_SHAPES:
        return _run_layers(values, rest[0])
    if rest[0] == "import":
        print_result(bench_import(values.repetitions or 15), is_json=values.json)
        return None
    config = read_config_flag(values)
    repetitions = values.repetitions or (3 if rest[0] in ("packed", "start") else 15)
    if rest[0] in ("step", "telemetry") and config.num_moe_layers == 0:
        raise UsageError(
            f"moe.num_experts={config.moe.num_experts}: bench {rest[0]} needs a MoE configuration"
        )
    measure = {
        "step": bench_step,
        "attention": bench_attention,
        "generate": bench_generate,
        "start": bench_start,
        "telemetry": bench_telemetry,
        "packed": bench_packed,
        "compile": bench_compile,
    }[rest[0]]
    print_result(measure(config, repetitions), is_json=values.json)
    return None


def _refuse_flags_of_others(values: FlagValues, benchmark: str) -> None:
    users: dict[str, tuple[str, ...]] = {
        "shapes": ("layer", "decode", "compiled"),
        "dtype": ("layer", "decode", "compiled"),
        "implementations": ("layer", "decode", "compiled"),
        "target": ("compiled", "compiled_step"),
        "topology": ("compiled_step",),
        "config": OF_RECIPES,
        "processes": IN_PROCESSES,
        "csv": ("layer", "decode", "compiled"),
        "plot": ("layer",),
        "repetitions": tuple(name for name in BENCHMARKS if not name.startswith("compiled")),
    }
    for name, allowed in users.items():
        if values[name].present and benchmark not in allowed:
            raise UsageError(
                f"--{name} belongs to moejax bench {', '.join(allowed)}; leave it out of {benchmark}"
            )


def _run_in_processes(values: FlagValues, benchmark: str) -> None:
    for flag in ("csv", "plot"):
        if values[flag].value:
            raise UsageError(
                f"--{flag} is of one process; leave it out, or --processes, whose rows --json prints"
            )
    if benchmark in OF_RECIPES:
        config = read_config_flag(values)
    else:
        config = None
        _read_layers(values, benchmark)
    given = [
        name
        for name in ("repetitions", "shapes", "implementations", "dtype")
        if values[name].present
    ]
    rows = bench_in_processes(
        benchmark, config, [values[name].serialize() for name in given], values.processes
    )
    if values.json:
        print(to_json({"processes": values.processes, "rows": rows}, indent=2))
        return
    for row in rows:
        names = [str(value) for value in row.values() if isinstance(value, str)]
        shown = {name: _spread(value) for name, value in row.items() if isinstance(value, dict)}
        print_result(
            shown,
            is_json=False,
            title=f"{', '.join(names)}: median of {values.processes} processes",
        )


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['median']:,.6g} ({figure['lowest']:,.6g} to {figure['highest']:,.6g})"


def _read_layers(values: FlagValues, benchmark: str) -> tuple[list[layer.Shape], list[str]]:
    """The shapes and the names of implementations that were asked for, which may be none."""
    shapes = layer.parse_shapes(values.shapes or DEFAULT_SHAPES[benchmark])
    known = layer.implementations_of(shapes[0])
    for name in values.implementations:
        if name not in known:
            raise UsageError(
                f"--implementations={name} must be some of {', '.join(known)}, separated by commas"
            )
    for flag in ("csv", "plot"):
        if values[flag].value:
            read_file_to_write(str(values[flag].value), f"--{flag}")
    return shapes, values.implementations


def _read_target(values: FlagValues, benchmark: str) -> Target:
    if values.target is None:
        raise UsageError(f"moejax bench {benchmark} needs --target, one of {', '.join(TARGETS)}")
    jax.config.update("jax_platforms", "cpu")  # it needs no device, and must not wait for one
    return TARGETS[values.target]


def _run_compiled_step(values: FlagValues) -> None:
    row = bench_compiled_step(
        read_config_flag(values), _read_target(values, "compiled_step"), values.topology
    )
    if values.json:
        print(to_json(row, indent=2))
        return
    print_result(_step_rows(row), is_json=False)
    if row["collectives"]:
        print_table(
            [_collective_columns(one) for one in row["collectives"]],
            title="What travels, by a device in a step",
        )
        print(
            "GB by the model of a ring; beside it what comes to that if branches are taken every time."
        )


def _run_compiled(values: FlagValues) -> None:
    target = _read_target(values, "compiled")
    shapes, names = _read_layers(values, "compiled")
    rows = []
    for shape in shapes:
        rows += bench_compiled(shape, names, values.dtype or "bfloat16", target)
    if values.json:
        print(to_json(rows, indent=2))
    else:
        _print_tables(rows, _compiled_columns)
        print("Kernels count the rows they have; tiles that rows do not fill come on top.")
    if values.csv:
        _write_csv(Path(values.csv), rows)


def _run_layers(values: FlagValues, benchmark: str) -> None:
    shapes, names = _read_layers(values, benchmark)
    names = names or layer.default_implementations()
    for name in names:
        if name in unavailable():
            raise UsageError(f"--implementations={name} cannot run here: {unavailable()[name]}")
    dtype = values.dtype or "float32"
    peaks, rows = measure_peaks(), []
    for shape in shapes:
        if benchmark == "layer":
            rows += layer.bench_layer(
                shape, names, layer.DIRECTIONS, dtype, values.repetitions or 4, peaks
            )
        else:
            rows += decode.bench_decode(shape, names, dtype, values.repetitions or 15, peaks)
    if values.json:
        print(to_json(rows, indent=2))
    else:
        _print_tables(rows, _columns)
        print(
            f"This machine: {peaks.gflops:.0f} GFLOP/s in a large product, {peaks.gbytes:.1f} GB/s in a large copy."
        )
    # After the figures are shown: a full disk must not lose them.
    if values.csv:
        _write_csv(Path(values.csv), rows)
    if values.plot:
        Path(values.plot).write_bytes(draw_layers(rows))


def _print_tables(
    rows: list[dict[str, Any]], columns: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """A table for each layer and direction."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = (
            f"{row['tokens']} tokens, D {row['d_model']}, F {row['d_expert']}, E {row['num_experts']}, K {row['top_k']}"
            f"{', skewed' if row['skewed'] else ''}, {row['dtype']}: {row['direction'].replace('_', ' and ')}"
        )
        groups.setdefault(title, []).append(row)
    for title, group in groups.items():
        print_table([columns(row) for row in group], title=title)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a line; quartiles as their distance from the median in percent."""
    low, high = row["quartiles_ms"]
    shown: dict[str, Any] = {
        "implementation": row["implementation"],
        "over dense": f"{row['ratio_to_dense']:.2f}",
        "ms": f"{row['ms']:.4g}",
        "quart. %": f"{100 * (low / row['ms'] - 1):+.0f} {100 * (high / row['ms'] - 1):+.0f}",
    }
    if "ratio_to_reading" in row:
        shown |= {"over reading": f"{row['ratio_to_reading']:.2f}", "GB/s": row["gbytes"]}
    else:
        shown["GFLOP/s"] = f"{row['gflops']:.0f} ({row['fraction_of_peak_gflops']:.0%})"
        shown["GB/s"] = f"{row['gbytes']:.1f} ({row['fraction_of_peak_gbytes']:.0%})"
    return shown | {"temp. MB": round(row["temporary_bytes"] / 1e6, 1)}


def _compiled_columns(row: dict[str, Any]) -> dict[str, Any]:
    has_figures = row["flops"] is not None
    megabytes = f"{row['temporary_bytes'] / 1e6:.1f}" if has_figures else ""
    kernels = ", ".join(f"{number} {name}" for name, number in (row["kernels"] or {}).items())
    return {
        "implementation": row["implementation"],
        "over ideal": f"{row['flops_over_ideal']:.3f}" if has_figures else None,
        "GFLOP": f"{row['flops'] / 1e9:.1f}" if has_figures else None,
        "temp. MB": megabytes if row["fits"] else f"{megabytes} too large".strip(),
        "kernels": (kernels or "XLA's own") if has_figures else None,
        "open loops": row["open_loops"],
    }


def _step_rows(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a compiled step, for a table."""

    def gbytes(name: str) -> str | None:
        return None if row[name] is None else f"{row[name] / 1e9:.2f}"

    mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    return {
        "target": f"{row['devices']} {row['target']}, {row['topology']}",
        "mesh": mesh or None,
        "tokens of a device": row["tokens_per_device"],
        "fits": "yes" if row["fits"] else "no",
        "GB held at most": gbytes("peak_bytes"),
        "GB of arguments": gbytes("argument_bytes"),
        "GB on the wire": gbytes("wire_bytes"),
        "GB on the wire in branches": gbytes("conditional_wire_bytes"),
    }


def _collective_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "collective": row["kind"],
        "along": f"{row['axis']} ({row['devices']})" if row["axis"] else None,
        "count": f"{row['count']:,}{' or more' if row['is_open'] else ''}",
        "GB": f"{row['bytes'] / 1e9:.2f}",
        "in branches": f"{row['conditional_count']:,}",
        "GB ": f"{row['conditional_bytes'] / 1e9:.2f}",
        "async.": row["asynchronous"],
        "overlap": row["overlapped"],
    }


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each row; quartiles in columns of their own, kernels as text."""
    flat = []
    for row in rows:
        row = dict(row)
        if quartiles := row.pop("quartiles_ms", None):
            row |= {"q25_ms": quartiles[0], "q75_ms": quartiles[1]}
        if row.get("kernels") is not None:
            row["kernels"] = "; ".join(
                f"{number} {name}" for name, number in row["kernels"].items()
            )
        flat.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*flat[0]])
        writer.writeheader()
        writer.writerows(flat)
