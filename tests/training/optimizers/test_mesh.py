"""An optimizer's step is the same on any mesh, and sends no experts around."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases.training import make, small_config

MATRIX_OPTIMIZERS = ("muon", "muonh", "adafactor")

MESHES = [
    {"data": 1, "expert": 4, "tensor": 2},
    {"data": 1, "fsdp": 4, "expert": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]

COLLECTIVE = re.compile(
    r"= \S+ (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
)


def config_of(name, mesh):
    return small_config(
        mesh=mesh,
        optimizer={"name": name, "clip_norm": 0.0, "weight_decay": 0.1},
        moe={"num_experts": 8, "num_shared_experts": 1},
    )


def step_of(setup):
    """Returns the compiled step of the optimizer alone, on the arrays of the mesh."""
    where = setup.shardings

    def step(params, gradients, moments):
        updates, moments = setup.optimizer.update(
            gradients, moments, params, learning_rate=jnp.float32(0.02)
        )
        return updates, moments

    compiled = jax.jit(
        step,
        in_shardings=(where.params, where.params, where.opt_state),
        out_shardings=(where.params, where.opt_state),
    )
    return compiled.lower(setup.abstract.params, setup.abstract.params, setup.abstract.opt_state)


def steps(name, mesh, num_devices):
    """Returns the updates of two steps, by the gradients of no loss."""
    setup = make(config_of(name, mesh), num_devices)
    rng = np.random.default_rng(0)
    with jax.set_mesh(setup.mesh):
        state = setup.init(0)
        step = step_of(setup).compile()
        moments, found = state.opt_state, []
        for _ in range(2):
            random = jax.tree.map(
                lambda x: rng.normal(size=x.shape).astype(np.float32), setup.abstract.params
            )
            gradients = jax.device_put(random, setup.shardings.params)
            updates, moments = step(state.params, gradients, moments)
            found.append(jax.device_get(updates))
    return found


@pytest.fixture(scope="module", params=MATRIX_OPTIMIZERS)
def alone(request):
    """The name of an optimizer, and its updates on one device."""
    return request.param, steps(request.param, {}, 1)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_step_is_that_of_one_device(alone, mesh):
    name, expected = alone
    found = steps(name, mesh, 8)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The second term is the rounding of weights, of which those of muonh are differences.
        tolerance = 2e-5 * np.abs(theirs).max() + 1e-6
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_experts_that_are_split_over_devices_are_not_sent(name):
    setup = make(config_of(name, {"data": 1, "expert": 8}), 8)
    with jax.set_mesh(setup.mesh):
        text = step_of(setup).compile().as_text()
    assert COLLECTIVE.findall(text) == []


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_moments_are_split_as_their_parameters(name):
    setup = make(config_of(name, {"data": 1, "fsdp": 2, "expert": 4}), 8)
    with jax.set_mesh(setup.mesh):
        moments = setup.init(0).opt_state
    sizes = {}
    for path, array in jax.tree_util.tree_leaves_with_path(moments):
        sizes[jax.tree_util.keystr(path, simple=True, separator="/")] = (
            array.addressable_shards[0].data.size / array.size
        )
    of_experts = {key: part for key, part in sizes.items() if "experts" in key}
    assert of_experts
    largest = 1 / 4 if name == "adafactor" else 1 / 8
    assert max(of_experts.values()) <= largest
