"""Every router, and every other kind of MoE layer, in a training step.

Independent of the machine, every parameter learns, state is updated once and is exact under resume.
"""

import dataclasses
import functools
from contextlib import closing

import jax
import numpy as np
import pytest

from cases.training import OTHER_CASES, ROUTER_CASES, case_config, initial_state, make, packed_batch
from moejax.config import ROUTER_RULES, Knobs
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.step import make_train_step, put_batch

# Whose sums over microbatches differ in kind: two passes through the model take long to compile.
ACCUMULATED = {
    "softmax_topk",
    "noisy_topk",
    "sigmoid_topk",
    "quantile",
    "expert_choice",
    "schedules",
    "experts",
    "routed attention",
}

# What another case could change in a step: a bias that follows the counts of all microbatches and
# devices, and slots of the whole batch. The rest differ from these in what is a function of each
# token or sequence alone, or in other sums over the tokens: `make test-slow` compares their steps.
ALWAYS = {"sigmoid_topk", "capacity of all"}

each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in ALWAYS else [pytest.mark.slow])
        for case in [*ROUTER_CASES, *OTHER_CASES]
    ],
)


@functools.cache
def two_steps(case, is_other=False):
    """Scalars, routing sums, changes of parameters and router state after two steps, on the host.

    `is_other` changes what must not matter: mesh, accumulation, remat.
    """
    sections = {"mesh": {"data": 1}}
    if is_other:
        mesh = (
            {"data": 1, "expert": 2, "tensor": 2}
            if case in OTHER_CASES
            else {"data": 2, "expert": 2}
        )
        sections = {
            "mesh": mesh,
            "train": {"accumulation": 2 if case in ACCUMULATED else 1},
            "model": {"remat": False},
        }
    config = case_config(case, **sections)
    setup = make(config, 4 if is_other else 1)
    with jax.set_mesh(setup.mesh):
        state, step, batch = (
            initial_state(setup),
            make_train_step(setup),
            put_batch(packed_batch(config), setup),
        )
        first = jax.device_get(state.params)
        for _ in range(2):
            state, output = step(state, batch, Knobs.from_config(config))
        output, state = jax.device_get((output, state))
    moved = jax.tree.map(lambda a, b: a - b, state.params, first)
    # What a buffer has no room for depends on how the mesh cuts the tokens; the results do not.
    scalars = {
        name: value for name, value in output.scalars.items() if name != "moe/buffer_overflow"
    }
    routing = output.routing and dataclasses.replace(output.routing, buffer_overflow=0.0)
    return scalars, routing, moved, state.router_state


def test_every_router_has_a_case():
    assert ROUTER_CASES.keys() == ROUTER_RULES.keys()


@each_case
def test_mesh_accumulation_and_remat_change_nothing(case):
    one, many = two_steps(case), two_steps(case, is_other=True)
    for name, value in one[0].items():
        np.testing.assert_allclose(many[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert one[1].assignments_E.tolist() == many[1].assignments_E.tolist()
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(x[2]) for x in (one, many)), strict=True
    ):
        # Adam divides by the gradient's own size and so enlarges rounding where a gradient is
        # almost zero.
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(a) + 1e-6, path
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(x[3]) for x in (one, many)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(path))


@each_case
def test_every_parameter_learns_from_the_loss(case):
    for path, moved in jax.tree_util.tree_leaves_with_path(two_steps(case)[2]):
        assert np.abs(moved).max() > 0, path


@pytest.mark.parametrize(
    "case",
    ["sigmoid_topk"]
    + [pytest.param(c, marks=pytest.mark.slow) for c in ("quantile", "noisy_topk", "schedules")],
)
def test_a_resumed_run_continues_bit_for_bit_with_biases_noise_and_limits(case, tmp_path):
    config = case_config(case, mesh={"data": 1}, train={"num_steps": 4})
    (tmp_path / "tokenizer.json").write_text("{}")
    setup = make(config)
    batch, step = put_batch(packed_batch(config), setup), make_train_step(setup)

    def steps(state, number):
        for _ in range(number):
            state, _ = step(state, batch, Knobs.from_config(config))
        return state

    with jax.set_mesh(setup.mesh):
        straight = jax.device_get(steps(initial_state(setup), 4))
        with closing(Checkpoints(tmp_path, setup)) as checkpoints:
            checkpoints.save(steps(initial_state(setup), 2))
        restored = Checkpoints(tmp_path, setup, read_only=True).restore()
        resumed = jax.device_get(steps(restored, 2))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(straight), jax.tree.leaves(resumed), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    state = jax.tree.leaves(straight.router_state)
    assert any(np.any(x) and x.dtype == np.float32 for x in state) or case == "noisy_topk"
