"""The router of attention in training: its losses count, and its statistics are reported."""

import jax
import pytest
from flax import nnx

from cases.training import case_config, initial_state, make, packed_batch, replace
from moejax.config import Knobs
from moejax.training.losses import forward_sums, losses
from moejax.training.step import make_train_step, put_batch


def test_its_losses_are_added_by_their_factor():
    config = case_config("routed attention", train={"batch_size": 2})
    setup = make(config)
    state = initial_state(setup)
    model = nnx.merge(setup.graphdef, state.params, state.router_state)
    knobs = Knobs.from_config(config)
    with jax.set_mesh(setup.mesh):
        sums = jax.jit(lambda batch: forward_sums(model, batch, knobs))(packed_batch(config))
    found = {}
    for factor in (0.0, 1.0, 2.0):
        changed = replace(config, "attention", router_loss_factor=factor)
        found[factor] = losses(sums, knobs, changed)
    for name in ("balance", "sequence_balance", "z"):
        of_attention = float(found[0.0][f"loss/attention_{name}"]) * config.model.num_layers
        assert of_attention > 0
        weight = getattr(config.moe, f"{name}_weight")
        for factor in (1.0, 2.0):
            added = found[factor][f"loss/{name}_weighted"] - found[0.0][f"loss/{name}_weighted"]
            assert float(added) == pytest.approx(factor * weight * of_attention, rel=1e-4)


def test_a_step_reports_its_statistics_as_means_over_layers():
    config = case_config("routed attention")
    setup = make(config)
    with jax.set_mesh(setup.mesh):
        batch = put_batch(packed_batch(config), setup)
        knobs = Knobs.from_config(config)
        _, output = make_train_step(setup)(initial_state(setup), batch, knobs)
    scalars = output.scalars
    of_experts = {name.removeprefix("moe/") for name in scalars if name.startswith("moe/")}
    of_attention = {name.removeprefix("attention/") for name in scalars if "attention/" in name}
    assert of_attention == of_experts - {"idle_steps"}
    assert output.routing.attention is None
    assert 0 < float(scalars["attention/entropy"]) < 1.8  # at most ln 6
