"""Norms by kind of parameters and by expert, of what a step does."""

import jax
import numpy as np
import pytest
from flax import nnx

from cases import training as cases
from moejax.config import Knobs, kind_of
from moejax.training.health.norms import norms_by_expert, norms_by_kind
from moejax.training.step import make_train_step, put_batch

PATTERN = {
    "model": {"num_layers": 5},
    "moe": {
        "first_dense": 1,
        "every": 2,
        "per_layer": "4: num_shared_experts=1 d_expert=24",
        "num_zero_experts": 1,
        "d_expert": 16,
    },
}


def one_step(**sections):
    config = cases.small_config(**sections)
    setup = cases.make(config)
    state = cases.initial_state(setup)
    before = jax.tree.map(np.asarray, state.params)
    with jax.set_mesh(setup.mesh):
        batch = put_batch(cases.packed_batch(config), setup)
        state, output = make_train_step(setup)(state, batch, Knobs.from_config(config))
    return config, before, jax.tree.map(np.asarray, state.params), jax.device_get(output)


def by_kind(tree):
    """Norms in float64 of all parameters of a kind together."""
    squares = {}
    for path, variable in nnx.to_flat_state(tree):
        kind = kind_of("/".join(map(str, path)))
        squares[kind] = squares.get(kind, 0) + np.square(variable[...], dtype=np.float64).sum()
    return {kind: np.sqrt(total) for kind, total in squares.items()}


def test_norms_by_kind_are_those_of_the_arrays():
    _, before, after, output = one_step(moe={"num_shared_experts": 1})
    change = jax.tree.map(lambda new, old: new.astype(np.float64) - old, after, before)
    weights = by_kind(before)
    assert set(weights) == {"embedding", "norm", "router", "shared", "experts", "attention"}
    for kind, norm in weights.items():
        assert output.scalars[f"norm/weight/{kind}"] == pytest.approx(norm, rel=1e-5)
    for kind, norm in by_kind(change).items():
        assert output.scalars[f"norm/update/{kind}"] == pytest.approx(norm, rel=1e-3), kind
    gradients = [output.scalars[f"norm/gradient/{kind}"] for kind in weights]
    assert np.linalg.norm(gradients) == pytest.approx(output.scalars["grad_norm"], rel=1e-5)


def test_norms_of_experts_are_by_layer_and_expert_whatever_the_pattern_of_layers():
    config, before, _, output = one_step(**PATTERN)
    found = output.state["weight_norms"]
    assert found.shape == (config.num_moe_layers, config.moe.num_choices) == (2, 5)
    assert np.isnan(found[:, 4]).all()  # the zero expert
    expected = {}
    for path, variable in nnx.to_flat_state(before):
        if "experts" in path:
            place = path[: path.index("experts")]
            squares = np.square(variable[...], dtype=np.float64)
            own = squares.sum(axis=tuple(range(2, squares.ndim)))
            expected[place] = expected.get(place, 0) + own
    rows = np.concatenate([np.sqrt(squares) for squares in expected.values()])
    np.testing.assert_allclose(found[:, :4], rows, rtol=1e-5)
    of_all = np.sqrt(np.square(output.state["gradient_norms"][:, :4]).sum())
    assert of_all == pytest.approx(output.scalars["norm/gradient/experts"], rel=1e-5)


def test_frozen_parameters_have_norms_of_weights_alone():
    _, _, _, output = one_step(optimizer={"frozen": "experts, router"})
    for kind in ("experts", "router"):
        assert f"norm/weight/{kind}" in output.scalars
        assert f"norm/gradient/{kind}" not in output.scalars
    assert "weight_norms" in output.state and "gradient_norms" not in output.state


def test_a_dense_model_has_norms_by_kind():
    _, _, _, output = one_step(moe={"num_experts": 0})
    kinds = {key.rpartition("/")[2] for key in output.scalars if key.startswith("norm/")}
    assert kinds == {"embedding", "norm", "attention", "dense"} and not output.state


def test_trees_without_experts_have_no_norms_of_experts():
    params = nnx.State({"embedding": nnx.Param(np.ones((2, 3), np.float32), axes=("a", "b"))})
    assert norms_by_expert({"weight": params}, 4) == {}
    (norm,) = norms_by_kind({"weight": params}).values()
    assert float(norm) == pytest.approx(6**0.5)
