"""Print versions, devices and kernels, and check that the set-up works.

Every grouped product that runs here, and the experts as this platform computes them, are compared
with the reference, values and gradients, and a small MoE model takes a training step on all
devices. With a recipe,

  moejax doctor --config=configs/expert_parallel.py --mesh=data=2,expert=4

the tokens of a tiny batch also meet their experts on its mesh, or on another, and are compared with
one device; a table says what travels. Exits 1 if a check fails.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import FlagValues
from jax.sharding import Mesh

from moejax.benchmarks.step import random_batch
from moejax.cli import UsageError
from moejax.cli.options import (
    define_config,
    define_json,
    define_mesh,
    define_processes,
    meet_as_flagged,
    parse_mesh,
    read_config_flag,
)
from moejax.cli.tables import print_result, print_table
from moejax.config import Config, Knobs, resolve
from moejax.kernels.grouped_matmul import (
    IMPLEMENTATIONS,
    grouped_matmul,
    resolve_implementation,
    unavailable,
)
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.on_device import run_dropless
from moejax.moe.experts.experts import ExpertWeights
from moejax.planning.memory import check_memory
from moejax.planning.mesh_check import check_mesh
from moejax.sharding import make_mesh
from moejax.training.multihost.processes import has_others, is_first
from moejax.training.run_directory.layout import git_commit, versions
from moejax.training.state import make_train_setup
from moejax.training.step import make_train_step, put_batch

TOLERANCE = 1e-4


class DoctorError(RuntimeError):
    """A check failed."""


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_mesh(values, "sizes instead of the recipe's")
    define_processes(values)
    define_json(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Checks everything, prints what is found as it is found, and fails if a check did.

    Of several processes each checks its own devices.
    """
    with meet_as_flagged(values, "doctor"):
        _run(values)


def _run(values: FlagValues) -> None:
    config = _config(values)
    # The choice of kernel is a row of the table: not a line of the log, too.
    logging.getLogger("moejax").setLevel(logging.WARNING)
    rows: dict[str, Any] = {
        **versions(),
        "git commit": git_commit() or None,
        "platform": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "grouped_matmul=auto": resolve_implementation("auto"),
    }
    failures = []
    checks: dict[str, Callable[[], str]] = {
        f"grouped_matmul={name}": functools.partial(check_grouped_matmul, name)
        for name in IMPLEMENTATIONS
        if name not in unavailable()
    }
    rows |= {f"grouped_matmul={name}": f"not here: {why}" for name, why in unavailable().items()}
    checks["experts"] = check_experts
    if not has_others():
        checks["training step"] = check_training_step
    collectives: list[dict[str, Any]] = []
    if config:
        check_memory(config)
        mesh = make_mesh(config)
        rows["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        checks["exchange"] = functools.partial(check_exchange, config, mesh, rows, collectives)
    is_told = is_first() and not values.json
    if is_told:
        print_result(rows, is_json=False)
    for name, check in checks.items():
        if is_first():
            print(f"checking {name} ...", file=sys.stderr, flush=True)
        try:
            # Else GPU and TPU multiply float32 with fewer bits, and differ from the
            # reference by that.
            with jax.default_matmul_precision("highest"):
                rows[f"check: {name}"] = check()
        except Exception as error:  # a broken set-up can fail in any way
            rows[f"check: {name}"] = f"FAILED: {str(error) or type(error).__name__}".splitlines()[0]
            failures.append(f"{name} failed: {rows[f'check: {name}'].removeprefix('FAILED: ')}")
        if is_told:
            print(f"{name}: {rows[f'check: {name}']}", flush=True)
    if is_told:
        _print_exchange(rows, collectives)
    elif is_first():
        print_result(rows | {"collectives": collectives} if config else rows, is_json=True)
    if failures:
        raise DoctorError(f"{'; '.join(failures)}; report it with the versions above")


def _print_exchange(rows: dict[str, Any], collectives: list[dict[str, Any]]) -> None:
    """Prints what the check of the exchange found, if there was one."""
    found = {
        name: value
        for name, value in rows.items()
        if name == "exchange" or name.startswith("on a device: ")
    }
    if found:
        print_result(found, is_json=False)
    if collectives:
        shown = [
            {"kind": row["kind"], "along": row["axis"] or "-", "devices": row["devices"], "times": row["count"],
             "bytes": row["bytes"], "times*": row["conditional_count"], "bytes*": row["conditional_bytes"]}
            for row in collectives
        ]  # fmt: skip
        print_table(
            shown,
            "What a device sends for a layer's experts, both passes; *: if tokens are left over",
        )


def check_grouped_matmul(name: str) -> str:
    """Compares one implementation with a loop over groups in NumPy, and its gradients with the reference's."""
    rng = np.random.default_rng(0)
    sizes = np.array([5, 0, 40, 19])
    x_RD = jnp.asarray(rng.normal(size=(80, 16)), jnp.float32)
    w_EDF = jnp.asarray(rng.normal(size=(4, 16, 24)), jnp.float32)
    groups = np.split(np.asarray(x_RD)[: sizes.sum()], np.cumsum(sizes)[:-1])
    expected_RF = np.concatenate(
        [rows @ w for rows, w in zip(groups, np.asarray(w_EDF), strict=True)]
    )
    actual_RF = grouped_matmul(x_RD, w_EDF, jnp.asarray(sizes), implementation=name)
    worst = np.abs(np.asarray(actual_RF)[: sizes.sum()] - expected_RF).max()

    def loss(implementation):
        return lambda x, w: (
            grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation) ** 2
        ).sum()

    for actual, expected in zip(
        jax.grad(loss(name), (0, 1))(x_RD, w_EDF),
        jax.grad(loss("dense"), (0, 1))(x_RD, w_EDF),
        strict=True,
    ):
        worst = np.maximum(
            worst, jnp.abs(actual - expected).max() / jnp.abs(expected).max()
        )  # keeps a NaN
    if not worst < TOLERANCE:
        raise DoctorError(f"differs from the reference by {worst:.1e}")
    return f"ok, within {worst:.0e} of the reference"


def check_experts() -> str:
    """Compares a layer's experts as "auto" computes them with the reference, outputs and all gradients."""
    rng = np.random.default_rng(0)
    shapes = (1, 40, 16), (1, 40, 2), (4, 16, 2, 24), (4, 24, 16)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    experts_BLK = jnp.asarray(
        rng.integers(0, 3, (1, 40, 2)), jnp.int32
    )  # the last expert gets nothing

    def layer(implementation, x_BLD, weights_BLK, gate_up_EDPF, down_EFD):
        chosen, weights = (
            TokenChoice(experts_BLK, weights_BLK),
            ExpertWeights(gate_up_EDPF, down_EFD),
        )
        return run_dropless(x_BLD, chosen, weights, implementation=implementation)

    results = []
    for implementation in ("auto", "dense"):
        y_BLD, pull = jax.vjp(functools.partial(layer, implementation), *arrays)
        results.append((y_BLD, *pull(jnp.ones_like(y_BLD))))
    differences = [jnp.abs(a - e).max() / jnp.abs(e).max() for a, e in zip(*results, strict=True)]
    worst = float(jnp.stack(differences).max())  # keeps a NaN
    if not worst < TOLERANCE:
        raise DoctorError(f"differs from the reference by {worst:.1e}")
    return f"ok, within {worst:.0e} of the reference"


def check_exchange(
    config: Config, mesh: Mesh, rows: dict[str, Any], collectives: list[dict[str, Any]]
) -> str:
    """Compares experts on the mesh with those on one device; adds to the tables what lies where and what travels."""
    found = check_mesh(config, mesh)
    rows["exchange"] = found.strategy
    rows |= {
        f"on a device: {name}": " x ".join(map(str, shape)) for name, shape in found.shapes.items()
    }
    collectives += found.collectives
    bad = {key: worst for key, worst in found.worst.items() if not worst < TOLERANCE}
    if bad:
        listed = ", ".join(f"{name} ({load}) by {worst:.1e}" for (load, name), worst in bad.items())
        raise DoctorError(f"{found.strategy} differs from one device: {listed}")
    return f"ok, within {max(found.worst.values()):.0e} of one device, gradients included"


def _config(values: FlagValues) -> Config | None:
    """The recipe with the sizes of `--mesh`; None without a recipe."""
    if values["config"].value is None:
        if values.mesh:
            raise UsageError(
                f"--mesh={values.mesh} needs --config; give a recipe, such as configs/expert_parallel.py"
            )
        return None
    config = read_config_flag(values)
    if config.num_moe_layers == 0:
        raise UsageError(
            "--config has no experts (moe.num_experts=0); give a recipe that has, or none"
        )
    return dataclasses.replace(config, mesh=parse_mesh(values.mesh)) if values.mesh else config


def check_training_step() -> str:
    """Trains a small MoE model for some steps on one batch; its loss must fall."""
    num_devices = jax.device_count()
    config = resolve(
        {
            "model": {
                "num_layers": 2,
                "d_model": 32 * num_devices,
                "num_heads": 2,
                "num_kv_heads": 1,
                "d_ff": 64,
            },
            "moe": {"num_experts": 4, "d_expert": 32},
            "data": {"tokenizer": "bytes", "seq_len": 32},
            "train": {"num_steps": 5, "batch_size": 2 * num_devices},
        }
    )
    setup = make_train_setup(config, make_mesh(config))
    batch = put_batch(random_batch(config), setup)
    with jax.set_mesh(setup.mesh):
        state, step, losses = setup.init(0), make_train_step(setup), []
        for _ in range(config.train.num_steps):
            state, output = step(state, batch, Knobs.from_config(config))
            losses.append(float(output.scalars["loss/lm"]))
    if not losses[-1] < losses[0]:
        raise DoctorError(
            f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
        )
    mesh = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    return f"ok on mesh {mesh}: loss {losses[0]:.3f} to {losses[-1]:.3f}"
