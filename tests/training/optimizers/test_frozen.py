"""Frozen parameters: no gradient, no moments, the same bits; the others train as without them."""

import jax
import numpy as np
import pytest
from flax import nnx

from cases.training import initial_state, make, packed_batch, small_config
from moejax.config import ConfigError, Knobs
from moejax.training.accumulation import loss_and_gradients
from moejax.training.checkpoints.meta import named_arrays
from moejax.training.packed.arms import Pack
from moejax.training.program import WITH_NORMS
from moejax.training.step import make_train_step, put_batch, row_keys

FROZEN = "router, embedding, stacks/0/block/mixer/*"


def is_frozen(name):
    return "router" in name or "embedding" in name or "/mixer/" in name


def train(num_devices=1, num_steps=3, **sections):
    """Returns the arrays before and after some steps."""
    setup = make(small_config(**sections), num_devices)
    state = initial_state(setup)
    before = {name: np.asarray(array) for name, array in named_arrays(state).items()}
    step = make_train_step(setup)
    knobs = Knobs.from_config(setup.config)
    with jax.set_mesh(setup.mesh):
        for seed in range(num_steps):
            batch = put_batch(packed_batch(setup.config, seed), setup)
            state, _ = step(state, batch, knobs)
    return before, {name: np.asarray(array) for name, array in named_arrays(state).items()}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_bits_of_frozen_parameters_stay_and_all_others_change(name):
    before, after = train(optimizer={"name": name, "frozen": FROZEN})
    params = [path for path in before if path.startswith("params/")]
    assert sum(map(is_frozen, params)) == 6
    for path in params:
        assert np.array_equal(before[path], after[path]) == is_frozen(path), path


def test_frozen_parameters_have_no_moments():
    before, _ = train(num_steps=0, optimizer={"frozen": FROZEN})
    moments = [path for path in before if path.startswith("opt_state/") and before[path].ndim]
    trained = [path for path in before if path.startswith("params/") and not is_frozen(path)]
    assert len(moments) == 2 * len(trained)
    assert not any(map(is_frozen, moments))


def gradients(**optimizer):
    setup = make(small_config(optimizer=optimizer))
    state = initial_state(setup)
    batch = put_batch(packed_batch(setup.config), setup)
    knobs = Knobs.from_config(setup.config)
    keys_B = row_keys(setup.config, knobs, state.step, len(batch.tokens_BL))

    def gradients_of(params):
        return loss_and_gradients(setup, params, state.router_state, batch, knobs, keys_B)

    with jax.set_mesh(setup.mesh):
        compiled = jax.jit(gradients_of).lower(state.params).compile()
        grads, _ = compiled(state.params)
    flops = compiled.cost_analysis()["flops"]
    flat = nnx.to_flat_state(grads)
    return {"/".join(map(str, path)): np.asarray(grad[...]) for path, grad in flat}, flops


def test_the_others_have_the_gradients_that_they_have_without_and_less_is_computed():
    whole, flops_of_whole = gradients()
    part, flops_of_part = gradients(frozen="experts, attention, embedding")
    assert set(part) == {path for path in whole if "router" in path or "norm" in path}
    for path, gradient in part.items():
        np.testing.assert_allclose(gradient, whole[path], rtol=1e-5, atol=1e-8, err_msg=path)
    assert flops_of_part < 0.85 * flops_of_whole


@pytest.mark.parametrize(
    ("num_devices", "sections"),
    [
        (8, {"mesh": {"data": 2, "fsdp": 2, "expert": 2}}),
        (1, {"train": {"batch_size": 8, "num_steps": 4, "accumulation": 4}}),
    ],
)
def test_they_are_the_same_on_a_mesh_and_with_accumulation(num_devices, sections):
    optimizer = {"frozen": FROZEN, "name": "sgd"}
    _, alone = train(optimizer=optimizer)
    before, other = train(num_devices, optimizer=optimizer, **sections)
    for path, array in alone.items():
        np.testing.assert_allclose(other[path], array, rtol=1e-5, atol=1e-6, err_msg=path)
        if path.startswith("params/") and is_frozen(path):
            assert np.array_equal(before[path], other[path]), path


def test_arms_of_a_pack_keep_their_frozen_parameters():
    configs = []
    for rate in (1e-3, 1e-2):
        configs.append(small_config(optimizer={"frozen": "router", "learning_rate": rate}))
    pack = Pack(configs, jax.devices()[:1])
    states = [setup.init(seed) for seed, setup in enumerate(pack.setups)]
    before = [{n: np.asarray(a) for n, a in named_arrays(state).items()} for state in states]
    with jax.set_mesh(pack.mesh):
        batch = pack.put_batches([packed_batch(config) for config in configs])
        state = pack.join(states)
        state, _ = pack.compile_step(state, batch)(state, batch, pack.knobs, WITH_NORMS)
    for arm, own in enumerate(pack.split(state, range(2))):
        for name, array in named_arrays(own).items():
            if name.startswith("params/"):
                is_same = np.array_equal(before[arm][name], np.asarray(array))
                assert is_same == ("router" in name), name


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ("rooter", "optimizer.frozen: 'rooter' is no kind of parameters; the nearest is router"),
        ("shared", "optimizer.frozen: no parameter of the model is shared; leave it out"),
        ("*/none/*", r"no parameter of the model is \*/none/\*"),
        ("router, router", "optimizer.frozen names router twice"),
        ("*", "leaves nothing to train; name less"),
    ],
)
def test_names_that_cannot_be_frozen_are_refused(frozen, message):
    with pytest.raises(ConfigError, match=message):
        make(small_config(optimizer={"frozen": frozen}))
