"""Convert a released model to a run directory, or back; or prove that it computes the same.

  moejax convert --hf=mixtral-8x7b --workdir=runs/mixtral      # safetensors to a run directory
  moejax convert --workdir=runs/mixtral --to_hf=out            # and back
  moejax convert --hf=mixtral-8x7b --compare=reference.npz     # against the reference's outputs

A folder in the Hugging Face layout has config.json and safetensors files. An interrupted conversion
goes on where it stopped, by the same command. docs/families.md lists the families, and says how to
write reference.npz; a difference beyond the tolerances exits with 1.
"""

import math
import shlex
import sys
from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.cli.errors import UsageError
from moejax.cli.options import (
    define_hf,
    define_json,
    define_workdir,
    read_folder_to_write,
    read_hf_folder,
    read_workdir,
    refuse_several_processes,
)
from moejax.cli.tables import print_result, print_table
from moejax.compilation_cache import keep_compilation_cache
from moejax.interop.hf.conversion.compare import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    Comparison,
    Difference,
    compare,
    read_reference,
)
from moejax.interop.hf.conversion.memory import keep_freed_memory
from moejax.interop.hf.conversion.to_hf import TORCH_DTYPES, convert_to_hf
from moejax.interop.hf.conversion.to_run import convert_to_run
from moejax.interop.hf.load import load_model, read_config
from moejax.models.parameters import count_parameters
from moejax.paths import resolve_path
from moejax.strict_json import to_json

MODES = (
    "--hf=DIR --workdir=RUN converts to a run directory, --workdir=RUN --to_hf=DIR back, and "
    "--hf=DIR --compare=FILE.npz compares"
)


OF_TO_HF = ("family", "step", "dtype")
OF_COMPARE = ("tolerance", "gradient_tolerance")


class DisagreementError(Exception):
    """A model that computes something else than its reference."""


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_json(values)
    define_hf(values, "a released model's folder in the Hugging Face layout")
    flags.DEFINE_string("to_hf", "", "the folder to write in that layout", flag_values=values)
    flags.DEFINE_string(
        "family",
        "",
        "with --to_hf: its model_type; default that of the model it was, or the first that fits",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "step", None, "with --to_hf: a saved step; default the newest", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        list(TORCH_DTYPES),
        "with --to_hf: of all tensors; default as released, or float32 after training",
        flag_values=values,
    )
    flags.DEFINE_string(
        "compare",
        "",
        "with --hf: inputs and outputs of the reference, an npz file",
        flag_values=values,
    )
    flags.DEFINE_float(
        "tolerance",
        TOLERANCE,
        "largest difference over an array's largest magnitude",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "gradient_tolerance",
        GRADIENT_TOLERANCE,
        "the same for gradients",
        lower_bound=0,
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Converts or compares."""
    refuse_several_processes("convert")
    keep_compilation_cache()
    keep_freed_memory()
    given = [name for name in ("hf", "workdir", "to_hf", "compare") if values[name].value]
    if given == ["hf", "workdir"]:
        _refuse(values, "--to_hf", OF_TO_HF)
        _refuse(values, "--compare", OF_COMPARE)
        _to_run(values)
    elif given == ["workdir", "to_hf"]:
        _refuse(values, "--compare", OF_COMPARE)
        _to_hf(values)
    elif given == ["hf", "compare"]:
        _refuse(values, "--to_hf", OF_TO_HF)
        _compare(values)
    else:
        flags_given = " ".join(f"--{name}" for name in given) or "no flags"
        raise UsageError(f"moejax convert with {flags_given} is not clear; {MODES}")


def _refuse(values: FlagValues, needed: str, names: tuple[str, ...]) -> None:
    """Raises `UsageError` for a flag that only goes with another one."""
    for name in names:
        if values[name].present:
            raise UsageError(f"--{name} goes with {needed} only; leave it out")


def _to_run(values: FlagValues) -> None:
    workdir = read_folder_to_write(values.workdir, "--workdir")
    command = shlex.join(["moejax", *sys.argv[1:]])
    checkpoint = convert_to_run(read_hf_folder(values), workdir, command=command)
    parameters = count_parameters(checkpoint.config)
    rows = {
        "family": checkpoint.family.model_type,
        "parameters": parameters.total,
        "active per token": parameters.active,
        "run directory": str(workdir),
    }
    print_result(rows, is_json=values.json)


def _to_hf(values: FlagValues) -> None:
    folder = read_folder_to_write(values.to_hf, "--to_hf")
    family = convert_to_hf(
        read_workdir(values),
        folder,
        model_type=values.family,
        step=values.step,
        dtype=values.dtype or "",
    )
    rows = {"family": family.model_type, "folder": str(folder)}
    print_result(rows, is_json=values.json)


def _compare(values: FlagValues) -> None:
    folder = read_hf_folder(values)
    reference = read_reference(resolve_path(values.compare, "--compare"))
    _, family = read_config(folder)
    comparison = compare(
        load_model(folder),
        family,
        reference,
        tolerance=values.tolerance,
        gradient_tolerance=values.gradient_tolerance,
    )
    if values.json:
        print(to_json(_as_json(comparison), indent=2))
    else:
        _print_summary(comparison)
    if not comparison.agrees:
        raise DisagreementError(
            f"{folder} computes something else than {values.compare}: {_first(comparison)}"
        )


def _as_json(comparison: Comparison) -> dict[str, Any]:
    arrays = {}
    for each in comparison.differences:
        arrays[each.name] = {
            "absolute": each.absolute,
            "relative": each.relative,
            "tolerance": each.tolerance,
            "within": each.is_within,
        }
    return {
        "agrees": comparison.agrees,
        "arrays": arrays,
        "experts_agree": comparison.experts_agree,
        "tokens_agree": comparison.tokens_agree,
        "not_compared": comparison.not_compared,
        "deviations": comparison.deviations,
    }


def _print_summary(comparison: Comparison) -> None:
    """Prints the largest difference of each kind of array, and what agrees."""
    worst: dict[str, Difference] = {}
    for each in comparison.differences:
        kind = _kind(each.name)
        if kind not in worst or each.relative > worst[kind].relative:
            worst[kind] = each
    rows = []
    for kind, each in worst.items():
        row = {
            "largest difference of": kind,
            "absolute": f"{each.absolute:.2g}",
            "relative": f"{each.relative:.2g}",
            "tolerance": f"{each.tolerance:.2g}",
        }
        rows.append(row)
    print_table(rows, "")
    for what, agreement in (
        ("routers select the reference's experts", comparison.experts_agree),
        ("greedy texts are the reference's", comparison.tokens_agree),
    ):
        if agreement:
            print(f"{sum(agreement.values())} of {len(agreement)} {what}")
    if comparison.not_compared:
        print(f"not compared: {', '.join(comparison.not_compared)}")
    for name, why in comparison.deviations.items():
        print(f"not compared: {name}: {why}")


def _kind(name: str) -> str:
    """Returns an array's name without layers and tensors."""
    prefix, _, _ = name.partition(".")
    if prefix in ("grad", "gradtotal"):
        return prefix
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _first(comparison: Comparison) -> str:
    """Returns what is furthest from its reference."""
    beyond = [each for each in comparison.differences if not each.is_within]
    if beyond:
        # What is no number is the furthest.
        worst = max(beyond, key=lambda each: (math.isnan(each.relative), each.relative))
        return (
            f"{worst.name} by {worst.relative:.2g} of its largest magnitude, and at most "
            f"{worst.tolerance:g} is tolerated"
        )
    routers = [router for router, same in comparison.experts_agree.items() if not same]
    if routers:
        return f"tokens select other experts at {routers[0]}"
    texts = [name for name, same in comparison.tokens_agree.items() if not same]
    return f"{texts[0]} are other tokens"
