"""Experts made of dense networks: the function is kept where the scheme says so."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.training import packed_batch, small_config
from moejax.config import ConfigError, resolve
from moejax.inference.load import load_run
from moejax.sharding import make_mesh
from moejax.training.forking.fork import fork_state
from moejax.training.forking.layers import places_of
from moejax.training.loop import train
from moejax.training.state import make_train_setup

D_FF = 32
STEPS = {"batch_size": 8, "num_steps": 3, "checkpoint_every": 3, "eval_every": 0, "log_every": 1}


def dense_config(**sections):
    model = {"num_layers": 3, "d_model": 32, "d_ff": D_FF} | sections.pop("model", {})
    return small_config(model=model, moe={"num_experts": 0}, train=STEPS, **sections)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of three layers, and its model."""
    workdir = tmp_path_factory.mktemp("upcycling") / "dense"
    train(dense_config(), workdir, command="")
    return workdir


def fork_config(workdir, upcycle, *, moe=None, model=None, **init):
    own_moe = {"num_experts": 4, "top_k": 2, "d_expert": D_FF} | (moe or {})
    own_model = {"num_layers": 3, "d_model": 32, "d_ff": D_FF} | (model or {})
    config = small_config(model=own_model, moe=own_moe, train=STEPS)
    init = {"source": str(workdir), "upcycle": upcycle} | init
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **init))


def model_of(config, num_devices=1, seed=5):
    """Returns the model with which a fork begins."""
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:num_devices]))
    state = fork_state(setup, seed, Path("no run yet"))
    state = jax.device_put(jax.device_get(state), jax.devices()[0])
    return nnx.merge(setup.graphdef, state.params, state.router_state)


def logits_of(model, config):
    batch = jax.tree.map(jnp.asarray, packed_batch(config))
    hidden_BLD, _ = model(batch.tokens_BL, batch.segments_BL, batch.positions_BL)
    return np.asarray(model.logits(hidden_BLD))


@pytest.mark.parametrize(
    ("upcycle", "moe"),
    [
        ("copy", {}),
        ("copy", {"first_dense": 1, "every": 2}),
        ("copy", {"router": "sigmoid_topk", "selection_bias": True}),
        ("granular", {"d_expert": 8, "num_experts": 12, "top_k": 4}),
        ("granular", {"d_expert": 16, "num_experts": 8, "top_k": 4}),
        ("granular", {"d_expert": 16, "num_experts": 6, "top_k": 2, "first_dense": 1}),
    ],
)
def test_copies_and_segments_compute_what_the_dense_model_computes(dense, upcycle, moe):
    config = fork_config(dense, upcycle, moe=moe)
    expected = logits_of(load_run(dense).model, dense_config())
    found = logits_of(model_of(config), config)
    # Experts add up in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert config.num_moe_layers > 0


def test_segments_of_a_copy_are_chosen_together(dense):
    config = fork_config(dense, "granular", moe={"d_expert": 8, "num_experts": 12, "top_k": 4})
    model = model_of(config)
    kernel = np.asarray(model.stacks[0].block.ffn.router.kernel[...])
    groups = kernel.reshape(3, 32, 3, 4)
    assert np.array_equal(groups, np.repeat(groups[..., :1], 4, axis=-1))
    assert np.abs(groups[:, :, 0, 0] - groups[:, :, 1, 0]).max() > 0


def test_noise_moves_copies_by_a_part_of_their_deviation(dense):
    quiet = model_of(fork_config(dense, "copy")).stacks[0].block.ffn.experts
    noisy = model_of(fork_config(dense, "copy", upcycle_noise=0.1)).stacks[0].block.ffn.experts
    for name in ("gate_up", "down"):
        before, after = (np.asarray(getattr(each, name)[...]) for each in (quiet, noisy))
        ratio = (after - before).std(axis=(2, 3)) / before.std(axis=(2, 3))
        np.testing.assert_allclose(ratio.reshape(3, 4, -1).mean(), 0.1, rtol=0.1)
        assert not np.array_equal(after[:, 0], after[:, 1])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_fraction_of_the_hidden_units_is_drawn_again_in_each_expert(dense, fraction):
    config = fork_config(dense, "drop", upcycle_drop=fraction)
    copies = model_of(fork_config(dense, "copy")).stacks[0].block.ffn.experts
    dropped = model_of(config).stacks[0].block.ffn.experts
    before, after = (np.asarray(each.gate_up[...]) for each in (copies, dropped))
    is_new_NEF = (before != after).all(axis=(2, 3))
    down_NEF = (np.asarray(copies.down[...]) != np.asarray(dropped.down[...])).all(axis=3)
    np.testing.assert_array_equal(is_new_NEF, down_NEF)  # a unit with both of its sides
    np.testing.assert_array_equal(is_new_NEF.sum(axis=2), round(fraction * D_FF))
    if fraction == 0.25:
        assert len({row.tobytes() for row in is_new_NEF.reshape(12, -1)}) == 12
        changed = after[0, 0][..., is_new_NEF[0, 0]]
        kept = before[0, 0][..., is_new_NEF[0, 0]]
        assert changed.std() == pytest.approx(kept.std(), rel=0.3)


@pytest.mark.parametrize("upcycle", ["copy", "drop"])
def test_the_first_state_is_the_same_on_a_mesh(dense, upcycle):
    config = fork_config(dense, upcycle)
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, expert=4))
    alone, other = model_of(config), model_of(split, 8)
    for (path, one), (_, two) in zip(
        nnx.to_flat_state(nnx.state(alone, nnx.Param)),
        nnx.to_flat_state(nnx.state(other, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_allclose(one[...], two[...], rtol=1e-6, atol=1e-7, err_msg=str(path))


def test_an_upcycled_run_trains_and_names_its_source(dense, tmp_path):
    config = fork_config(dense, "copy")
    assert train(config, tmp_path / "moe", command="").step == 3
    assert load_run(tmp_path / "moe").config.init.upcycle == "copy"


def test_layers_are_found_in_every_pattern():
    config = small_config(
        model={"num_layers": 7}, moe={"first_dense": 1, "every": 2, "per_layer": "4: dense"}
    )
    places = places_of(config)
    numbers = np.concatenate([place.layers.reshape(-1) for place in places])
    assert sorted(numbers.tolist()) == list(range(7))
    for place in places:
        for layer in place.layers.reshape(-1):
            assert (config.layers[layer] is not None) == place.is_moe


@pytest.mark.parametrize(
    ("upcycle", "sections", "message"),
    [
        ("copy", {"moe": {"d_expert": 16}}, "moe.d_expert=16 must be 32, the width"),
        ("granular", {"moe": {"d_expert": 12}}, "cuts networks of width 32 into experts"),
        (
            "granular",
            {"moe": {"d_expert": 8, "num_experts": 6, "top_k": 4}},
            "must be multiples of the number of segments",
        ),
        (
            "granular",
            {"moe": {"d_expert": 8, "num_experts": 8, "top_k": 2}},
            "must be multiples of the number of segments",
        ),
        ("copy", {"model": {"d_model": 64}}, "in the source and .* in this model; use the sizes"),
        ("copy", {"model": {"num_layers": 5}}, "the source has nothing for stacks/0/block/"),
    ],
)
def test_experts_that_cannot_be_made_are_refused(dense, upcycle, sections, message):
    with pytest.raises(ConfigError, match=message):
        model_of(fork_config(dense, upcycle, **sections))


def test_a_source_with_experts_is_refused(dense, tmp_path):
    train(fork_config(dense, "copy"), tmp_path / "moe", command="")
    with pytest.raises(ConfigError, match=r"makes experts of dense layers, and init\.source"):
        model_of(fork_config(tmp_path / "moe", "copy"))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 0}, "makes experts, and moe.num_experts=0"),
        ({"num_experts": 4, "num_shared_experts": 1}, "no shared, zero, identity"),
        ({"num_experts": 4, "num_zero_experts": 1}, "no shared, zero, identity"),
        ({"num_experts": 4, "renormalize": False}, "experts whose weights sum to 1"),
        ({"num_experts": 4, "route_scale": 2.0}, "moe.route_scale=1"),
    ],
)
def test_layers_that_cannot_begin_as_dense_ones_are_refused(moe, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"moe": moe, "init": {"source": "runs/a", "upcycle": "copy"}})
