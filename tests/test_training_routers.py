"""Every router in a training step: independent of the machine, its state updated once, exact under resume."""

import functools

import jax
import numpy as np
import pytest

from moejax.config import ROUTER_RULES, Knobs
from moejax.training.step import make_train_step, put_batch
from training_cases import ROUTER_CASES, make, packed_batch, router_config

each_router = pytest.mark.parametrize(
    "router", [pytest.param(router, marks=pytest.mark.xdist_group(router)) for router in ROUTER_CASES]
)


@functools.cache
def two_steps(router, num_devices=1, accumulation=1):
    """Scalars, routing sums, parameters and router state after two steps, on the host."""
    mesh = {"data": num_devices // 2, "expert": 2} if num_devices > 1 else {"data": 1}
    config = router_config(router, mesh=mesh, train={"accumulation": accumulation})
    trainable = make(config, num_devices)
    with jax.set_mesh(trainable.mesh):
        state, step, batch = trainable.init(0), make_train_step(trainable), put_batch(packed_batch(config), trainable)
        first = jax.device_get(state.params)
        for _ in range(2):
            state, output = step(state, batch, Knobs.of(config))
        output, state = jax.device_get((output, state))
    moved = jax.tree.map(lambda a, b: a - b, state.params, first)
    return output.scalars, output.routing, moved, state.router_state


def test_every_router_has_a_case():
    assert ROUTER_CASES.keys() == ROUTER_RULES.keys()


@each_router
def test_mesh_and_accumulation_change_nothing_for_any_router(router):
    one, many = two_steps(router), two_steps(router, num_devices=4, accumulation=2)
    for name, value in one[0].items():
        np.testing.assert_allclose(many[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert one[1].assignments_E.tolist() == many[1].assignments_E.tolist()
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x[2]) for x in (one, many)), strict=True):
        # Adam divides by the gradient's own size and so enlarges rounding where a gradient is almost zero.
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(a) + 1e-6, path
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x[3]) for x in (one, many)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(path))


@each_router
def test_all_parameters_of_any_router_learn_from_the_loss(router):
    for path, moved in jax.tree_util.tree_leaves_with_path(two_steps(router)[2]):
        assert np.abs(moved).max() > 0, path
