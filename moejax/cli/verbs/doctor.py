"""Print versions, devices and kernels, and check that the set-up works.

Every grouped product that runs here, and the experts as this platform computes them, are compared
with the reference, values and gradients, and a small MoE model takes a training step on all
devices. With a recipe,

  moejax doctor --config=configs/expert_parallel.py --mesh=data=2,expert=4

the tokens of a tiny batch also go through their experts on its mesh, or on another, and are
compared with one device; a table shows what devices send. Exits 1 if a check fails.
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
    distributed_context,
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
"""The largest difference from a reference, over its largest value, with which a check passes."""


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
    with distributed_context(values, "doctor"):
        _run(values)


def _run(values: FlagValues) -> None:
    config = _config(values)
    # The choice of kernel is a row of the table: not a line of the log, too.
    logging.getLogger("moejax").setLevel(logging.WARNING)
    rows = _facts()
    checks = _checks()
    collectives: list[dict[str, Any]] = []
    if config:
        check_memory(config)
        mesh = make_mesh(config)
        rows["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        checks["exchange"] = functools.partial(check_exchange, config, mesh, rows, collectives)
    is_shown = is_first() and not values.json
    if is_shown:
        print_result(rows, is_json=False)
    failures = _run_checks(checks, rows, is_shown=is_shown)
    if is_shown:
        _print_exchange(rows, collectives)
    elif is_first():
        print_result(rows | {"collectives": collectives} if config else rows, is_json=True)
    if failures:
        raise DoctorError(f"{'; '.join(failures)}; report it with the versions above")


def _facts() -> dict[str, Any]:
    """Returns what is known before any check."""
    rows: dict[str, Any] = {
        **versions(),
        "git commit": git_commit() or None,
        "platform": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "grouped_matmul=auto": resolve_implementation("auto"),
    }
    for name, why in unavailable().items():
        rows[f"grouped_matmul={name}"] = f"not here: {why}"
    return rows


def _checks() -> dict[str, Callable[[], str]]:
    """Returns by name the checks that need no recipe; each returns what it found."""
    checks: dict[str, Callable[[], str]] = {}
    for name in IMPLEMENTATIONS:
        if name not in unavailable():
            checks[f"grouped_matmul={name}"] = functools.partial(check_grouped_matmul, name)
    checks["experts"] = check_experts
    if not has_others():
        checks["training step"] = check_training_step
    return checks


def _run_checks(
    checks: dict[str, Callable[[], str]],
    rows: dict[str, Any],
    *,
    is_shown: bool,
) -> list[str]:
    """Runs checks, adds to the rows what they found, and returns the failures."""
    failures = []
    for name, check in checks.items():
        if is_first():
            print(f"checking {name} ...", file=sys.stderr, flush=True)
        try:
            # Otherwise GPU and TPU multiply float32 with fewer bits, and differ from the
            # reference by that.
            with jax.default_matmul_precision("highest"):
                found = check()
        except Exception as error:  # a broken set-up can fail in any way
            message = str(error) or type(error).__name__
            found = f"FAILED: {message}".splitlines()[0]
            failures.append(f"{name} failed: {found.removeprefix('FAILED: ')}")
        rows[f"check: {name}"] = found
        if is_shown:
            print(f"{name}: {found}", flush=True)
    return failures


def _print_exchange(rows: dict[str, Any], collectives: list[dict[str, Any]]) -> None:
    """Prints what the check of expert parallelism found, if there was one."""
    found = {}
    for name, value in rows.items():
        if name == "exchange" or name.startswith("on a device: "):
            found[name] = value
    if found:
        print_result(found, is_json=False)
    if collectives:
        print_table(
            [_collective_columns(row) for row in collectives],
            "What a device sends for a layer's experts, both passes; *: on buffer overflow",
        )


def _collective_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the table shows of a kind of collectives."""
    return {
        "kind": row["kind"],
        "along": row["axis"] or "-",
        "devices": row["devices"],
        "times": row["count"],
        "bytes": row["bytes"],
        "times*": row["conditional_count"],
        "bytes*": row["conditional_bytes"],
    }


def check_grouped_matmul(name: str) -> str:
    """Compares one implementation with a loop over groups, and its gradients with the reference."""
    rng = np.random.default_rng(0)
    sizes_E = np.array([5, 0, 40, 19])
    num_rows = sizes_E.sum()  # the other rows belong to no group
    x_RD = rng.normal(size=(80, 16)).astype(np.float32)
    w_EDF = rng.normal(size=(4, 16, 24)).astype(np.float32)
    arrays = (jnp.asarray(x_RD), jnp.asarray(w_EDF))
    group_sizes_E = jnp.asarray(sizes_E)

    def run(x_RD, w_EDF, implementation):
        return grouped_matmul(x_RD, w_EDF, group_sizes_E, implementation=implementation)

    def gradients(implementation):
        def loss(x_RD, w_EDF):
            y_RF = run(x_RD, w_EDF, implementation)
            return (y_RF**2).sum()

        return jax.grad(loss, (0, 1))(*arrays)

    actual_RF = np.asarray(run(*arrays, name))
    expected_RF = _grouped_products(x_RD[:num_rows], w_EDF, sizes_E)
    difference_RF = actual_RF[:num_rows] - expected_RF
    worst = np.abs(difference_RF).max()
    for actual, expected in zip(gradients(name), gradients("dense"), strict=True):
        difference = _relative_difference(actual, expected)
        worst = np.maximum(worst, difference)  # keeps a NaN
    return _passed(float(worst))


def _grouped_products(
    x_RD: np.ndarray,
    w_EDF: np.ndarray,
    group_sizes_E: np.ndarray,
) -> np.ndarray:
    """Returns the products of each group of rows with its own matrix."""
    ends_E = np.cumsum(group_sizes_E)
    groups = np.split(x_RD, ends_E[:-1])
    products = []
    for rows, w_DF in zip(groups, w_EDF, strict=True):
        products.append(rows @ w_DF)
    return np.concatenate(products)


def check_experts() -> str:
    """Compares a layer's experts as "auto" computes them with the reference, gradients included."""
    rng = np.random.default_rng(0)
    shapes = (1, 40, 16), (1, 40, 2), (4, 16, 2, 24), (4, 24, 16)
    drawn = [rng.normal(size=shape) for shape in shapes]
    arrays = [jnp.asarray(array, jnp.float32) for array in drawn]
    drawn_experts_BLK = rng.integers(0, 3, (1, 40, 2))  # none for the last expert
    experts_BLK = jnp.asarray(drawn_experts_BLK, jnp.int32)

    def outputs_and_gradients(implementation):
        def layer(x_BLD, weights_BLK, gate_up_EDPF, down_EFD):
            chosen = TokenChoice(experts_BLK, weights_BLK)
            weights = ExpertWeights(gate_up_EDPF, down_EFD)
            return run_dropless(x_BLD, chosen, weights, implementation=implementation)

        y_BLD, pull = jax.vjp(layer, *arrays)
        dy_BLD = jnp.ones_like(y_BLD)
        return y_BLD, *pull(dy_BLD)

    actual = outputs_and_gradients("auto")
    expected = outputs_and_gradients("dense")
    differences = list(map(_relative_difference, actual, expected))
    worst = jnp.stack(differences).max()  # keeps a NaN
    return _passed(float(worst))


def _relative_difference(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Returns the largest difference over the largest value."""
    largest_difference = jnp.abs(actual - expected).max()
    largest = jnp.abs(expected).max()
    return largest_difference / largest


def _passed(worst: float) -> str:
    """Returns the line of a check that passed, and raises `DoctorError` for one that did not."""
    if not worst < TOLERANCE:  # so that NaN fails
        raise DoctorError(f"differs from the reference by {worst:.1e}")
    return f"ok, within {worst:.0e} of the reference"


def check_exchange(
    config: Config,
    mesh: Mesh,
    rows: dict[str, Any],
    collectives: list[dict[str, Any]],
) -> str:
    """Compares experts on the mesh with those on one device.

    Adds the local shapes to the rows, and the traffic between devices to the collectives.
    """
    found = check_mesh(config, mesh)
    rows["exchange"] = found.strategy
    for name, shape in found.shapes.items():
        rows[f"on a device: {name}"] = " x ".join(map(str, shape))
    collectives += found.collectives
    failed = []
    for (load, name), worst in found.worst.items():
        if not worst < TOLERANCE:  # so that NaN fails
            failed.append(f"{name} ({load}) by {worst:.1e}")
    if failed:
        shown = ", ".join(failed)
        raise DoctorError(f"{found.strategy} differs from one device: {shown}")
    worst_of_all = max(found.worst.values())
    return f"ok, within {worst_of_all:.0e} of one device, gradients included"


def _config(values: FlagValues) -> Config | None:
    """Returns the recipe with the sizes of `--mesh`; None without a recipe."""
    if values["config"].value is None:
        if values.mesh:
            raise UsageError(
                f"--mesh={values.mesh} needs --config; give a recipe, such as "
                "configs/expert_parallel.py"
            )
        return None
    config = read_config_flag(values)
    if config.num_moe_layers == 0:
        raise UsageError(
            "--config has no experts (moe.num_experts=0); give a recipe that has, or none"
        )
    if not values.mesh:
        return config
    return dataclasses.replace(config, mesh=parse_mesh(values.mesh))


def check_training_step() -> str:
    """Trains a small MoE model for some steps on one batch; its loss must fall."""
    config = _small_config(jax.device_count())
    num_steps = config.train.num_steps
    setup = make_train_setup(config, make_mesh(config))
    batch = put_batch(random_batch(config), setup)
    losses = []
    with jax.set_mesh(setup.mesh):
        state = setup.init(0)
        train_step = make_train_step(setup)
        knobs = Knobs.from_config(config)
        for _ in range(num_steps):
            state, output = train_step(state, batch, knobs)
            loss = output.scalars["loss/lm"]
            losses.append(float(loss))
    first, *_, last = losses
    if not last < first:
        raise DoctorError(f"the loss went from {first:.3f} to {last:.3f} in {num_steps} steps")
    mesh = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    return f"ok on mesh {mesh}: loss {first:.3f} to {last:.3f}"


def _small_config(num_devices: int) -> Config:
    """Returns a MoE model and a batch that any number of devices can split."""
    model = {
        "num_layers": 2,
        "d_model": 32 * num_devices,
        "d_ff": 64,
    }
    return resolve(
        {
            "model": model,
            "attention": {"num_heads": 2, "num_kv_heads": 1},
            "moe": {"num_experts": 4, "d_expert": 32},
            "data": {"tokenizer": "bytes", "seq_len": 32},
            "train": {"num_steps": 5, "batch_size": 2 * num_devices},
        }
    )
