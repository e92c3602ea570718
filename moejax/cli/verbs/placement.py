"""Show how even the load of devices is, and would be with other placements or replicas.

  moejax placement --workdir=runs/tiny_moe --devices=4 --replicas=1

The load is that of the validation split in the run's newest evaluation, or that of --step. The
figures are the largest load of a device over the mean: 1 is even. `moejax eval --mesh=expert=4
--replicas=1` evaluates the model in that placement.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import define_json, define_workdir, read_workdir, refuse_several_processes
from moejax.cli.tables import print_table
from moejax.config import Config
from moejax.moe.expert_parallel.placement import identity_placement, imbalance, place, place_by_load
from moejax.strict_json import to_json
from moejax.training.run_directory.evaluation_log import newest_evaluation
from moejax.training.run_directory.layout import read_config


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_json(values)
    flags.DEFINE_integer(
        "devices",
        None,
        "that share the experts; default as in the run",
        flag_values=values,
    )
    flags.DEFINE_integer("replicas", 1, "spare slots of each device for copies", flag_values=values)
    flags.DEFINE_integer("step", None, "of an evaluation; default the newest", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Prints a row for each MoE layer, and one for the worst of them."""
    refuse_several_processes("placement")
    workdir = read_workdir(values)
    config = read_config(workdir)
    _check_experts(config, workdir)
    devices = values.devices
    if devices is None:
        devices = config.mesh.dcn_expert * config.mesh.expert
    if devices < 2:
        raise UsageError(
            f"--devices={devices} must be at least 2: how many devices share the experts, such as 4"
        )
    evaluation = newest_evaluation(workdir, values.step)
    load_NE = evaluation["load"][:, : config.moe.num_experts]
    maps = {"in order": identity_placement(*load_NE.shape), "placed": place(load_NE, devices)}
    if values.replicas:
        maps["placed, with copies"] = place(load_NE, devices, values.replicas)
    worst_N_of = {name: imbalance(load_NE, map_NP, devices) for name, map_NP in maps.items()}
    rows = _rows(config.moe_layers, worst_N_of)
    if values.json:
        print(to_json(rows, indent=2))
        return
    title = f"Largest load of {devices} devices over the mean; {values.replicas} copies on each"
    print_table(rows, title)
    if values.replicas:
        _explain(config.moe_layers, load_NE, maps["placed, with copies"], devices, values.replicas)


def _rows(
    layers: Sequence[int],
    worst_N_of: Mapping[str, np.ndarray],
) -> list[dict[str, str | float]]:
    """Returns the figures of each layer by the name of a placement, and those of the worst one."""
    rows: list[dict[str, str | float]] = [{"layer": str(layer)} for layer in layers]
    worst: dict[str, str | float] = {"layer": "worst"}
    for name, worst_N in worst_N_of.items():
        for row, figure in zip(rows, worst_N.tolist(), strict=True):
            row[name] = round(figure, 3)
        worst[name] = round(float(worst_N.max()), 3)
    return [*rows, worst]


def _check_experts(config: Config, workdir: Path) -> None:
    """Raises `UsageError` for a run that has no experts whose placement matters."""
    if config.num_moe_layers == 0:
        raise UsageError(
            f"--workdir={workdir} is a run of a dense model, which has no experts to place"
        )
    if any(kind.router in ("expert_choice", "soft") for kind in config.moe_groups):
        raise UsageError(
            f"--workdir={workdir}: experts that choose tokens have equal loads, wherever they are"
        )


def _explain(
    layers: Sequence[int],
    load_NE: np.ndarray,
    placed_NP: np.ndarray,
    devices: int,
    replicas: int,
) -> None:
    """Prints in which layers replicas would not help, and what their slots hold instead."""
    placed_N = imbalance(load_NE, placed_NP, devices)
    replicated_NP = place_by_load(load_NE, devices, replicas)
    replicated_N = imbalance(load_NE, replicated_NP, devices)
    useless = []
    for layer, replicated, placed in zip(layers, replicated_N, placed_N, strict=True):
        if replicated > placed:
            useless.append(f"layer {layer}: {replicated:.3f} with, {placed:.3f} without")
    if not useless:
        return
    figures = ", ".join(useless)
    print(
        f"Copies would make some layers less even ({figures}): a copy takes an equal share of its "
        "expert's load to a device, which may have enough. There spare slots repeat experts of "
        "their own device, and move nothing."
    )
