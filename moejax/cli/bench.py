"""Measure. Everything is compared within one run: repetitions are interleaved, figures are medians, ratios come first.

moejax bench layer     the experts of a layer over a dense layer with the same active FLOPs, by implementation
moejax bench decode    the same for a few tokens, over reading the weights of the chosen experts once
moejax bench tune      sizes of tiles for a shape; enters in the tuning table what is better than the guess beyond noise
moejax bench step      the train step of --config over its dense twin's
moejax bench compile   compile time of the train step, 64 over 8 experts and 8 over 2 layers
moejax bench import    importing moejax over importing jax and flax
"""

import csv
import json
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.benchmarks import decode, layer, tune
from moejax.benchmarks.step import bench_compile, bench_import, bench_step
from moejax.benchmarks.timing import measure_peaks
from moejax.cli import UsageError
from moejax.cli.options import define_config, define_json, read_config_flag
from moejax.cli.tables import print_result, print_table
from moejax.inspection.bench_figure import draw_layers
from moejax.kernels.tiles import TABLE, read_table

BENCHMARKS = ("layer", "decode", "tune", "step", "compile", "import")
DEFAULT_SHAPES = {
    "layer": "mixtral,mixtral-64,olmoe,deepseek",
    "tune": "mixtral,mixtral-64,olmoe,deepseek",
    "decode": "1:512:1024:64:2,16:512:1024:64:2,64:512:1024:64:2",
}


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments, default="configs/tiny_moe.py")
    define_json(values)
    flags.DEFINE_integer("repetitions", 0, "timed repetitions of each side; 0: 15, of layers 4", flag_values=values)
    shapes = (
        f"layer, decode, tune: some of {', '.join(layer.PRESETS)}, or T:D:F:E:K; :skewed after it gives one expert half"
    )
    flags.DEFINE_string("shapes", "", f"{shapes}; separated by commas", flag_values=values)
    names = ", ".join(layer.implementations_of(layer.PRESETS["mixtral"]))
    flags.DEFINE_list("implementations", [], f"layer, decode: some of {names}", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "layer, decode, tune: of all arrays", flag_values=values
    )
    flags.DEFINE_string("csv", "", "layer, decode: a file to write the rows to", flag_values=values)
    flags.DEFINE_string("table", str(TABLE), "tune: the tuning table to update", flag_values=values)
    flags.DEFINE_string("plot", "", "layer: a file for a picture of the ratios (.svg)", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Runs one benchmark and prints its figures."""
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        raise UsageError(f"moejax bench takes one of {', '.join(BENCHMARKS)}; got {' '.join(rest) or 'nothing'}")
    if values.repetitions < 0:
        raise UsageError(f"--repetitions={values.repetitions} must be at least 0, which stands for the default")
    _refuse_flags_of_others(values, rest[0])
    if rest[0] == "tune":
        return _run_tune(values)
    if rest[0] in DEFAULT_SHAPES:
        return _run_layers(values, rest[0])
    config, repetitions = read_config_flag(values), values.repetitions or 15
    if rest[0] == "step" and config.num_moe_layers == 0:
        raise UsageError(f"moe.num_experts={config.moe.num_experts}: bench step needs a MoE configuration")
    measure = {"step": bench_step, "compile": bench_compile, "import": bench_import}[rest[0]]
    print_result(measure(config, repetitions), is_json=values.json)
    return None


def _refuse_flags_of_others(values: FlagValues, benchmark: str) -> None:
    users: dict[str, tuple[str, ...]] = {
        "shapes": ("layer", "decode", "tune"),
        "dtype": ("layer", "decode", "tune"),
        "implementations": ("layer", "decode"),
        "csv": ("layer", "decode"),
        "plot": ("layer",),
        "table": ("tune",),
    }
    for name, allowed in users.items():
        if values[name].present and benchmark not in allowed:
            raise UsageError(f"--{name} belongs to moejax bench {', '.join(allowed)}; leave it out of {benchmark}")


def _run_layers(values: FlagValues, benchmark: str) -> None:
    shapes = layer.parse_shapes(values.shapes or DEFAULT_SHAPES[benchmark])
    names = values.implementations or layer.default_implementations()
    known = layer.implementations_of(shapes[0])
    for name in names:
        if name not in known:
            raise UsageError(f"--implementations={name} must be some of {', '.join(known)}, separated by commas")
    for file in filter(None, (values.csv, values.plot)):
        if not Path(file).parent.is_dir():
            raise UsageError(f"{file} cannot be written: {Path(file).parent} is not a folder; make it first")
    peaks, rows = measure_peaks(), []
    for shape in shapes:
        if benchmark == "layer":
            rows += layer.bench_layer(shape, names, layer.DIRECTIONS, values.dtype, values.repetitions or 4, peaks)
        else:
            rows += decode.bench_decode(shape, names, values.dtype, values.repetitions or 15, peaks)
    if values.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_tables(rows)
        print(f"This machine: {peaks.gflops:.0f} GFLOP/s in a large product, {peaks.gbytes:.1f} GB/s in a large copy.")
    # After the figures are shown: a full disk must not lose them.
    if values.csv:
        _write_csv(Path(values.csv), rows)
    if values.plot:
        Path(values.plot).write_bytes(draw_layers(rows))


def _run_tune(values: FlagValues) -> None:
    path, rows = Path(values.table), []
    if not path.is_file():
        raise UsageError(f"--table={path} is not a file; an empty table is one that holds {{}}")
    read_table(path)
    for shape in layer.parse_shapes(values.shapes or DEFAULT_SHAPES["tune"]):
        of_shape, better = tune.bench_tune(shape, values.dtype, values.repetitions or 7)
        tune.update_table(path, shape, better)
        rows += of_shape
        if not values.json:
            print_table([{k: v for k, v in row.items() if k != "shape"} for row in of_shape], title=str(shape))
            kept = " ".join(map(str, better)) if better else "the guess, which nothing beats beyond noise"
            print(f"Kept: {kept}.")
    if values.json:
        print(json.dumps(rows, indent=2))


def _print_tables(rows: list[dict[str, Any]]) -> None:
    """A table for each layer and direction."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = (
            f"{row['tokens']} tokens, D {row['d_model']}, F {row['d_expert']}, E {row['num_experts']}, K {row['top_k']}"
            f"{', skewed' if row['skewed'] else ''}, {row['dtype']}: {row['direction'].replace('_', ' and ')}"
        )
        groups.setdefault(title, []).append(row)
    for title, group in groups.items():
        print_table([_columns(row) for row in group], title=title)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a line; quartiles as their distance from the median in percent."""
    low, high = row["quartiles_ms"]
    shown: dict[str, Any] = {
        "implementation": row["implementation"],
        "over dense": f"{row['ratio_to_dense']:.2f}",
        "ms": row["ms"],
        "quartiles %": f"{100 * (low / row['ms'] - 1):+.0f} {100 * (high / row['ms'] - 1):+.0f}",
    }
    if "ratio_to_reading" in row:
        shown |= {"over reading": f"{row['ratio_to_reading']:.2f}", "GB/s": row["gbytes"]}
    else:
        shown["GFLOP/s"] = f"{row['gflops']:.0f} ({row['fraction_of_peak_gflops']:.0%})"
    return shown | {"temp. MB": round(row["temporary_bytes"] / 1e6, 1)}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each row; the quartiles in columns of their own."""
    flat = [{**row, "q25_ms": row["quartiles_ms"][0], "q75_ms": row["quartiles_ms"][1]} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in flat[0] if name != "quartiles_ms"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)
