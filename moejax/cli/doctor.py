"""Print versions, devices and kernels, and check that the set-up works.

Every grouped product that runs here, and the experts as this platform computes them, are compared with the reference,
values and gradients, and a small MoE model takes a training step on all devices. Exits 1 if a check fails.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import FlagValues

from moejax.benchmarks.step import random_batch
from moejax.cli.options import define_json
from moejax.cli.tables import print_result
from moejax.config import Knobs, resolve
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, resolve_implementation, unavailable
from moejax.moe.experts import ExpertWeights
from moejax.moe.local import Chosen, run_dropless
from moejax.sharding import make_mesh
from moejax.training.run_directory import git_commit, versions
from moejax.training.state import make_trainable
from moejax.training.step import make_train_step, put_batch

TOLERANCE = 1e-4


class DoctorError(RuntimeError):
    """A check failed."""


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_json(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Checks everything, prints a table, and fails if a check did."""
    # The choice of kernel is a row of the table: not a line of the log, too.
    logging.getLogger("moejax").setLevel(logging.WARNING)
    rows = {
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
    checks["training step"] = check_training_step
    for name, check in checks.items():
        try:
            # Else GPU and TPU multiply float32 with fewer bits, and differ from the reference by that.
            with jax.default_matmul_precision("highest"):
                rows[f"check: {name}"] = check()
        except Exception as error:  # a broken set-up can fail in any way
            rows[f"check: {name}"] = f"FAILED: {str(error) or type(error).__name__}".splitlines()[0]
            failures.append(name)
    print_result(rows, is_json=values.json)
    if failures:
        raise DoctorError(f"{', '.join(failures)} failed; see the table, and report it with the versions above")


def check_grouped_matmul(name: str) -> str:
    """Compares one implementation with a loop over groups in NumPy, and its gradients with the reference's."""
    rng = np.random.default_rng(0)
    sizes = np.array([5, 0, 40, 19])
    x_RD = jnp.asarray(rng.normal(size=(80, 16)), jnp.float32)
    w_EDF = jnp.asarray(rng.normal(size=(4, 16, 24)), jnp.float32)
    groups = np.split(np.asarray(x_RD)[: sizes.sum()], np.cumsum(sizes)[:-1])
    expected_RF = np.concatenate([rows @ w for rows, w in zip(groups, np.asarray(w_EDF), strict=True)])
    actual_RF = grouped_matmul(x_RD, w_EDF, jnp.asarray(sizes), implementation=name)
    worst = np.abs(np.asarray(actual_RF)[: sizes.sum()] - expected_RF).max()

    def loss(implementation):
        return lambda x, w: (grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation) ** 2).sum()

    for actual, expected in zip(
        jax.grad(loss(name), (0, 1))(x_RD, w_EDF), jax.grad(loss("dense"), (0, 1))(x_RD, w_EDF), strict=True
    ):
        worst = np.maximum(worst, jnp.abs(actual - expected).max() / jnp.abs(expected).max())  # keeps a NaN
    if not worst < TOLERANCE:
        raise DoctorError(f"differs from the reference by {worst:.1e}")
    return f"ok, within {worst:.0e} of the reference"


def check_experts() -> str:
    """Compares a layer's experts as "auto" computes them with the reference, outputs and all gradients."""
    rng = np.random.default_rng(0)
    shapes = (1, 40, 16), (1, 40, 2), (4, 16, 2, 24), (4, 24, 16)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    experts_BLK = jnp.asarray(rng.integers(0, 3, (1, 40, 2)), jnp.int32)  # the last expert gets nothing

    def layer(implementation, x_BLD, weights_BLK, gate_up_EDPF, down_EFD):
        chosen, weights = Chosen(experts_BLK, weights_BLK), ExpertWeights(gate_up_EDPF, down_EFD)
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


def check_training_step() -> str:
    """Trains a small MoE model for some steps on one batch; its loss must fall."""
    num_devices = jax.device_count()
    config = resolve(
        {
            "model": {"num_layers": 2, "d_model": 32 * num_devices, "num_heads": 2, "num_kv_heads": 1, "d_ff": 64},
            "moe": {"num_experts": 4, "d_expert": 32},
            "data": {"tokenizer": "bytes", "seq_len": 32},
            "train": {"num_steps": 5, "batch_size": 2 * num_devices},
        }
    )
    trainable = make_trainable(config, make_mesh(config))
    batch = put_batch(random_batch(config), trainable)
    with jax.set_mesh(trainable.mesh):
        state, step, losses = trainable.init(0), make_train_step(trainable), []
        for _ in range(config.train.num_steps):
            state, output = step(state, batch, Knobs.of(config))
            losses.append(float(output.scalars["loss/lm"]))
    if not losses[-1] < losses[0]:
        raise DoctorError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    mesh = ", ".join(f"{axis} {size}" for axis, size in trainable.mesh.shape.items())
    return f"ok on mesh {mesh}: loss {losses[0]:.3f} to {losses[-1]:.3f}"
