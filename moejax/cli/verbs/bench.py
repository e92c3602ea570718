"""Measure. Everything is compared within one run; figures are medians, and ratios come first.

moejax bench layer          the experts of a layer over a dense layer with the same active FLOPs, by
                            implementation
moejax bench decode         the same for a few tokens, over reading the weights of the chosen
                            experts once
moejax bench compiled       the experts of a layer compiled for --target: arithmetic over the ideal,
                            memory, kernels
moejax bench compiled_step  the train step of --config compiled for --target and --topology: memory,
                            traffic between devices
moejax bench step           the train step of --config over its dense twin's
moejax bench optimizers     the train step of --config by optimizer, over that of AdamW
moejax bench attention      the train step of --config with rows four times as long, and attention
                            over that with all scores
moejax bench generate       decode steps of 16 sequences of --config, by how tokens are drawn
moejax bench start          from the start of `moejax train` to its first step, with compiled
                            programs kept and without
moejax bench telemetry      logging intervals of --config with all that is logged over those with
                            their loss alone
moejax bench packed         a sweep over 8 seeds of --config: separate processes and one process
                            over a pack
moejax bench compile        compile time of the train step, 64 over 8 experts and 8 over 2 layers
moejax bench import         importing moejax over importing jax and flax

Repetitions of what is compared are interleaved. Without --config, benchmarks of a recipe take
configs/tiny_moe.py. Ratios can differ from process to process by more than within one:
--processes=5 runs a benchmark in five and shows the median, the lowest and the highest.
"""

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
from moejax.benchmarks.optimizers import bench_optimizers
from moejax.benchmarks.packed import bench_packed
from moejax.benchmarks.processes import bench_in_processes
from moejax.benchmarks.start import bench_start
from moejax.benchmarks.step import bench_compile, bench_import, bench_step
from moejax.benchmarks.telemetry import bench_telemetry
from moejax.benchmarks.timing import measure_peaks
from moejax.cli import UsageError
from moejax.cli.bench_tables import (
    compiled_columns,
    layer_columns,
    print_layers,
    print_processes,
    print_step,
    write_csv,
)
from moejax.cli.options import define_config, define_json, read_config_flag, read_file_to_write
from moejax.cli.tables import print_result
from moejax.inspection.figures.bench import draw_layers
from moejax.kernels.grouped_matmul import unavailable
from moejax.planning.targets import TARGETS, Target
from moejax.strict_json import to_json

OF_RECIPES: dict[str, Callable[..., dict[str, Any]]] = {
    "step": bench_step,
    "optimizers": bench_optimizers,
    "attention": bench_attention,
    "generate": bench_generate,
    "start": bench_start,
    "telemetry": bench_telemetry,
    "packed": bench_packed,
    "compile": bench_compile,
}
"""Benchmarks that time what a configuration does."""

BENCHMARKS = ("layer", "decode", "compiled", "compiled_step", *OF_RECIPES, "import")

READ_RECIPE = ("compiled_step", *OF_RECIPES)
"""Benchmarks of a configuration; the others have shapes, or neither."""

OF_SHAPES = ("layer", "decode", "compiled")
"""Benchmarks of a layer of given sizes."""

IN_PROCESSES = (
    "layer",
    "decode",
    "step",
    "optimizers",
    "attention",
    "generate",
    "telemetry",
    "compile",
)
"""Benchmarks that --processes repeats; the others start processes, or time nothing."""

TIMED = tuple(name for name in BENCHMARKS if not name.startswith("compiled"))

USERS: dict[str, tuple[str, ...]] = {
    "shapes": OF_SHAPES,
    "dtype": OF_SHAPES,
    "implementations": OF_SHAPES,
    "target": ("compiled", "compiled_step"),
    "topology": ("compiled_step",),
    "config": READ_RECIPE,
    "processes": IN_PROCESSES,
    "csv": OF_SHAPES,
    "plot": ("layer",),
    "repetitions": TIMED,
}
"""By flag, the benchmarks to which it means something."""

DEFAULT_RECIPE = "configs/tiny_moe.py"
DEFAULT_SHAPES = {
    "layer": "mixtral,mixtral-64,olmoe,deepseek",
    "compiled": "mixtral,mixtral-64,olmoe,deepseek",
    "decode": "1:512:1024:64:2,16:512:1024:64:2,64:512:1024:64:2",
}


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    reads_recipe = any(word in READ_RECIPE for word in arguments)
    define_config(values, arguments, DEFAULT_RECIPE if reads_recipe else None)
    define_json(values)
    _define_layers(values)
    flags.DEFINE_integer(
        "repetitions",
        0,
        "timed repetitions of each side; 0: 15, of layers 4, packed and start 3",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "target",
        None,
        [*TARGETS],
        "compiled, compiled_step: the device",
        flag_values=values,
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
        "csv",
        "",
        "layer, decode, compiled: a file to write the rows to",
        flag_values=values,
    )
    flags.DEFINE_string(
        "plot",
        "",
        "layer: a file for a picture of the ratios (.svg)",
        flag_values=values,
    )


def _define_layers(values: FlagValues) -> None:
    """Flags of benchmarks of a layer."""
    presets = ", ".join(layer.PRESETS)
    flags.DEFINE_string(
        "shapes",
        "",
        f"layer, decode, compiled: some of {presets}, or T:D:F:E:K; :skewed after it gives one "
        "expert half; separated by commas",
        flag_values=values,
    )
    names = ", ".join(layer.implementations_of(layer.PRESETS["mixtral"]))
    flags.DEFINE_list(
        "implementations",
        [],
        f"layer, decode, compiled: some of {names}",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "layer, decode, compiled: of all arrays; by default float32, and bfloat16 for compiled",
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Runs one benchmark and prints its figures."""
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        given = " ".join(rest) or "nothing"
        raise UsageError(f"moejax bench takes one of {', '.join(BENCHMARKS)}; got {given}")
    (benchmark,) = rest
    _check_flags(values, benchmark)
    if values.processes > 1:
        _run_in_processes(values, benchmark)
    elif benchmark == "compiled":
        _run_compiled(values)
    elif benchmark == "compiled_step":
        _run_compiled_step(values)
    elif benchmark in OF_SHAPES:
        _run_layers(values, benchmark)
    elif benchmark == "import":
        print_result(bench_import(values.repetitions or 15), is_json=values.json)
    else:
        _run_of_recipe(values, benchmark)


def _check_flags(values: FlagValues, benchmark: str) -> None:
    """Raises `UsageError` for a number that cannot be, and for a flag of other benchmarks."""
    if values.repetitions < 0:
        raise UsageError(
            f"--repetitions={values.repetitions} must be at least 0, which stands for the default"
        )
    if values.processes < 1:
        raise UsageError(f"--processes={values.processes} must be at least 1")
    for name, users in USERS.items():
        if values[name].present and benchmark not in users:
            raise UsageError(
                f"--{name} belongs to moejax bench {', '.join(users)}; leave it out of {benchmark}"
            )


def _run_of_recipe(values: FlagValues, benchmark: str) -> None:
    config = read_config_flag(values)
    if benchmark in ("step", "telemetry") and config.num_moe_layers == 0:
        raise UsageError(
            f"moe.num_experts={config.moe.num_experts}: bench {benchmark} needs a MoE configuration"
        )
    default_repetitions = 3 if benchmark in ("packed", "start") else 15
    row = OF_RECIPES[benchmark](config, values.repetitions or default_repetitions)
    print_result(row, is_json=values.json)


def _run_in_processes(values: FlagValues, benchmark: str) -> None:
    for flag in ("csv", "plot"):
        if values[flag].value:
            raise UsageError(
                f"--{flag} is of one process; leave it out, or --processes, whose rows --json "
                "prints"
            )
    config = None
    if benchmark in READ_RECIPE:
        config = read_config_flag(values)
    else:
        _read_layers(values, benchmark)  # its errors are those of the processes, said before them
    passed_on = ("repetitions", "shapes", "implementations", "dtype")
    arguments = [values[name].serialize() for name in passed_on if values[name].present]
    rows = bench_in_processes(benchmark, config, arguments, values.processes)
    if values.json:
        print(to_json({"processes": values.processes, "rows": rows}, indent=2))
    else:
        print_processes(rows, values.processes)


def _read_layers(values: FlagValues, benchmark: str) -> tuple[list[layer.Shape], list[str]]:
    """Returns the shapes and the implementations that were asked for, which may be none."""
    shapes = layer.parse_shapes(values.shapes or DEFAULT_SHAPES[benchmark])
    known = layer.implementations_of(shapes[0])
    for name in values.implementations:
        if name not in known:
            raise UsageError(
                f"--implementations={name} must be some of {', '.join(known)}, separated by commas"
            )
    for flag in ("csv", "plot"):
        file = values[flag].value
        if file:
            read_file_to_write(str(file), f"--{flag}")
    return shapes, values.implementations


def _read_target(values: FlagValues, benchmark: str) -> Target:
    if values.target is None:
        raise UsageError(f"moejax bench {benchmark} needs --target, one of {', '.join(TARGETS)}")
    jax.config.update("jax_platforms", "cpu")  # it needs no device, and must not wait for one
    return TARGETS[values.target]


def _run_compiled_step(values: FlagValues) -> None:
    config = read_config_flag(values)
    target = _read_target(values, "compiled_step")
    row = bench_compiled_step(config, target, values.topology)
    if values.json:
        print(to_json(row, indent=2))
    else:
        print_step(row)


def _run_compiled(values: FlagValues) -> None:
    target = _read_target(values, "compiled")
    shapes, names = _read_layers(values, "compiled")
    dtype = values.dtype or "bfloat16"
    rows = []
    for shape in shapes:
        rows += bench_compiled(shape, names, dtype, target)
    if values.json:
        print(to_json(rows, indent=2))
    else:
        print_layers(rows, compiled_columns)
        print("Kernels count the rows they have; tiles that rows do not fill come on top.")
    if values.csv:
        write_csv(Path(values.csv), rows)


def _run_layers(values: FlagValues, benchmark: str) -> None:
    shapes, names = _read_layers(values, benchmark)
    names = names or layer.default_implementations()
    for name in names:
        if name in unavailable():
            raise UsageError(f"--implementations={name} cannot run here: {unavailable()[name]}")
    dtype = values.dtype or "float32"
    peaks = measure_peaks()
    rows = []
    for shape in shapes:
        if benchmark == "layer":
            repetitions = values.repetitions or 4
            rows += layer.bench_layer(shape, names, layer.DIRECTIONS, dtype, repetitions, peaks)
        else:
            repetitions = values.repetitions or 15
            rows += decode.bench_decode(shape, names, dtype, repetitions, peaks)
    if values.json:
        print(to_json(rows, indent=2))
    else:
        print_layers(rows, layer_columns)
        print(
            f"This machine: {peaks.gflops:.0f} GFLOP/s in a large product, {peaks.gbytes:.1f} GB/s "
            "in a large copy."
        )
    # After the figures are shown: a full disk must not lose them.
    if values.csv:
        write_csv(Path(values.csv), rows)
    if values.plot:
        Path(values.plot).write_bytes(draw_layers(rows))
