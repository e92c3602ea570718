"""Leaves that nothing reads: what the code reads is recorded, and all others must be refused."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from cases.config import nested, other_value
from cases.moe import info_of
from cases.training import OTHER_CASES, ROUTER_CASES, SMALL
from moejax.config import (
    ConfigError,
    DataConfig,
    Knobs,
    MoeConfig,
    OptimizerConfig,
    UnreadError,
    declared,
    is_read,
    resolve,
    resolve_recorded,
    to_dict,
)
from moejax.data import prepare
from moejax.moe.balancing.losses import auxiliary_losses
from moejax.moe.layer import MoE
from moejax.training import router_state
from moejax.training.learning_rate import make_schedule
from moejax.training.optimizers.frozen import trained_params
from moejax.training.optimizers.make import make_optimizer
from moejax.training.run_directory.changes import first_change

PACKAGE = Path(moejax.__file__).parent
CONTEXTS = {name: {"router": name} | case for name, case in ROUTER_CASES.items()}
CONTEXTS |= {
    name: OTHER_CASES[name]["moe"]
    for name in ("experts", "weights on the input", "capacity of all")
}

READ_BY_THE_MODEL = {"first_dense", "every", "per_layer", "num_experts", "save_exchanged"}
"""Leaves of `moe` that are read outside of the layer."""

READ_BY_RESOLVE = {"allow_noncausal", "top_k"}
"""A permission, which may refuse a configuration, and what the slots of `soft` follow from."""


class Recorder:
    """The leaves of a section that code of moejax reads, apart from that of `moejax.config`."""

    def __init__(self, monkeypatch, *sections):
        self.names = set()
        for section in sections:
            monkeypatch.setattr(section, "__getattribute__", self._recording(section))

    def _recording(self, section):
        names = {field.name for field in dataclasses.fields(section)}
        properties = {name for name in vars(section) if isinstance(vars(section)[name], property)}

        def read(instance, name):
            if name in names:
                code = sys._getframe(1).f_code
                file = Path(code.co_filename)
                is_config = file.is_relative_to(PACKAGE / "config")
                is_reader = file.is_relative_to(PACKAGE) and not is_config
                if is_reader or code.co_name in properties:
                    self.names.add(name)
            return object.__getattribute__(instance, name)

        return read


def config_of(context, **changes):
    sections = {name: SMALL.get(name, {}) for name in ("model", "data", "train")}
    return sections | {"moe": SMALL["moe"] | CONTEXTS[context] | changes}


def run_layer(config):
    """Traces one MoE layer in training and evaluation, with its losses and its router's update."""
    moe = config.moe_groups[0]
    mask_BL = jnp.ones((2, config.data.seq_len), bool)
    x_BLD = jnp.ones((2, config.data.seq_len, config.model.d_model))
    keys_B = jax.random.split(jax.random.key(0), 2)

    def call(factor):
        layer = MoE(
            moe,
            config.model.d_model,
            jnp.float32,
            vocab_size=config.vocab_size,
            rngs=nnx.Rngs(params=0),
        )
        y_BLD, stats = layer(x_BLD, info_of(moe, mask_BL, factor, keys_B))
        stats = jax.tree.map(lambda a: a[None], stats)
        if moe.has_selection_bias:
            bias_NE = layer.selection_bias[...][None]
            router_state._update("selection_bias", bias_NE, stats, moe, Knobs.from_config(config))
        losses.update(auxiliary_losses(stats, moe))
        return y_BLD

    losses = {}
    for factor in (1.0, None):
        jax.eval_shape(functools.partial(call, factor))
    return {f"{name}_weight" for name in losses}


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_leaf_of_moe_is_read_by_the_layer_or_refused(context, monkeypatch):
    config = resolve(config_of(context))
    assert config.layers[0] is not None
    recorder = Recorder(monkeypatch, MoeConfig, Knobs)
    weights = run_layer(config)
    found = recorder.names | weights | READ_BY_THE_MODEL | READ_BY_RESOLVE
    monkeypatch.undo()
    for field in dataclasses.fields(MoeConfig):
        key = f"moe.{field.name}"
        value, _ = other_value(key)
        given = config_of(context).get("moe", {}).get(field.name, declared()[key].default)
        if field.name in found or value == given:
            continue
        try:
            resolve(config_of(context, **{field.name: value}))
        except ConfigError as error:
            assert key in str(error)
        else:
            pytest.fail(f"nothing reads {key}={value}, and it is accepted")


@pytest.mark.parametrize("context", ["softmax_topk", "soft", "hash", "experts"])
def test_an_unread_leaf_is_refused_with_its_value_its_need_and_the_remedy(context):
    config = resolve(config_of(context))
    for key, each in declared().items():
        if is_read(config, key) or each.leaf.needs is None:
            continue
        sections = to_dict(config)
        sections[each.section][each.name], _ = other_value(key)
        try:
            resolve(sections, typed=[key])
        except UnreadError as error:
            message = str(error)
            assert message.startswith(f"{key}=") and "\n" not in message
            assert each.needs_text in message and f"leave {key}" in message
        except ConfigError as error:  # it is also refused for another reason
            assert key in str(error)
        else:
            pytest.fail(f"{key} is accepted")


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        ("cosine", "adamw"),
        ("linear", "muon"),
        ("wsd", "muonh"),
        ("cosine", "adafactor"),
        ("linear", "lion"),
        ("wsd", "sgd"),
    ],
)
def test_every_leaf_of_the_optimizer_is_read_or_refused(schedule, name, monkeypatch):
    chosen = {"optimizer.schedule": schedule, "optimizer.name": name}
    config = resolve(nested(chosen))
    recorder = Recorder(monkeypatch, OptimizerConfig)
    make_schedule(config.optimizer, 100)
    params = jax.tree.map(lambda w: nnx.Param(w, axes=("embed",)), {"w": jnp.ones(2)})
    make_optimizer(config.optimizer, trained_params(config.optimizer, nnx.State(params)))
    monkeypatch.undo()
    for field in dataclasses.fields(OptimizerConfig):
        if field.name in recorder.names | {"learning_rate"}:  # which is a knob
            continue
        key = f"optimizer.{field.name}"
        with pytest.raises(UnreadError, match=key):
            resolve(nested(chosen | {key: other_value(key)[0]}))


def test_every_leaf_of_the_data_is_read_or_refused(tmp_path, monkeypatch):
    base = {"data.source": "synthetic", "data.tokenizer": "bytes", "data.seq_len": 32}
    config = resolve(nested(base | {"data.directory": str(tmp_path)}))
    recorder = Recorder(monkeypatch, DataConfig)
    prepare(config.data)
    monkeypatch.undo()
    unread = {field.name for field in dataclasses.fields(DataConfig)} - recorder.names
    assert {"name", "source_dir", "files", "vocab_size"} <= unread
    for name in unread:
        with pytest.raises(UnreadError, match=f"data.{name}"):
            resolve(nested(base | {f"data.{name}": other_value(f"data.{name}")[0]}))


def test_a_leaf_that_its_choice_reads_is_accepted():
    accepted = {
        "moe.sinkhorn_iterations": {"moe.router": "sinkhorn", "moe.allow_noncausal": True},
        "data.files": {"data.source": "files"},
        "optimizer.decay_fraction": {"optimizer.schedule": "wsd"},
        "moe.exchange_chunks": {"mesh.expert": 2},
        "model.d_ff": {"moe.first_dense": 1, "moe.d_expert": 8},
        "alarms.drops": {"moe.dispatch": "capacity"},
    }
    for key, others in accepted.items():
        value, _ = other_value(key)
        assert resolve(nested({key: value} | others), typed=[key])


def test_what_may_be_unread_in_a_recipe_is_refused_if_it_is_typed():
    unread = {"moe.exchange": "ring", "model.d_ff": 512, "moe.d_expert": 8, "alarms.drops": 0.5}
    assert resolve(nested(unread))
    for key in ("moe.exchange", "model.d_ff", "alarms.drops"):
        with pytest.raises(UnreadError, match=key):
            resolve(nested(unread), typed=[key])


def test_a_dense_twin_ignores_the_recipe_and_refuses_what_is_typed():
    recipe = {
        "moe.num_experts": 0,
        "moe.top_k": 4,
        "moe.router": "sinkhorn",
        "alarms.collapse": 0.5,
    }
    assert resolve(nested(recipe)).num_moe_layers == 0
    for key in ("moe.top_k", "moe.router", "alarms.collapse"):
        with pytest.raises(UnreadError, match=rf"{key}=.* in a dense model \(moe.num_experts=0\)"):
            resolve(nested(recipe), typed=[key])


def test_a_recorded_configuration_may_hold_leaves_that_do_nothing():
    recorded = nested(
        {"moe.sinkhorn_iterations": 3, "data.files": "x", "optimizer.decay_fraction": 0.5}
    )
    assert resolve_recorded(recorded).moe.sinkhorn_iterations == 3
    with pytest.raises(UnreadError):
        resolve(recorded)
    with pytest.raises(ConfigError, match=r"optimizer\.beta1"):
        resolve_recorded(nested({"optimizer.beta1": 1.0}))


def test_a_run_with_a_leaf_that_did_nothing_goes_on_without_it():
    recorded = resolve_recorded(nested({"data.files": "x", "moe.sinkhorn_iterations": 3}))
    assert first_change(recorded, resolve({})) is None
    change = first_change(recorded, resolve(nested({"data.source": "files", "data.files": "y"})))
    assert change is not None and change.key == "data.source"


def test_a_resolved_configuration_resolves_again_with_what_was_derived():
    for router in ("cosine", "soft", "hash", "sinkhorn"):
        config = resolve(
            nested({"moe.router": router, "moe.allow_noncausal": True, "model.d_ff": 512})
        )
        assert resolve(to_dict(config)) == config


def test_a_leaf_is_accepted_if_any_layer_reads_it():
    in_one_layer = {
        "moe.per_layer": "0: router=sinkhorn",
        "moe.allow_noncausal": True,
        "moe.sinkhorn_iterations": 3,
    }
    assert resolve(nested(in_one_layer)).layers[0].sinkhorn_iterations == 3
    with pytest.raises(
        UnreadError, match=r"moe.per_layer: sinkhorn_iterations=3 does nothing in layer 1"
    ):
        resolve(nested({"moe.per_layer": "1: sinkhorn_iterations=3"}))
    every = {"moe.router": "cosine", "moe.per_layer": "0-3: router=hash"}
    with pytest.raises(
        UnreadError, match=r"moe.router='cosine' does nothing: moe.per_layer=.* sets it in every"
    ):
        resolve(nested(every))


def test_top_k_is_read_if_the_width_of_experts_follows_from_it():
    given = {"model": {"d_ff": 1024, "num_layers": 4}, "moe": {"num_experts": 8, "top_k": 4}}
    in_layers = {"per_layer": "0-3: top_k=1 renormalize=False"}
    assert resolve(given | {"moe": given["moe"] | in_layers}).moe.d_expert == 256
    with pytest.raises(UnreadError, match=r"moe\.top_k=4 does nothing: .* sets it in every layer"):
        resolve(given | {"moe": given["moe"] | in_layers | {"d_expert": 100}})


def test_what_varies_in_a_sweep_may_make_a_leaf_of_its_recipe_read():
    recipe = nested({"moe.bias_rate": 5e-3})
    assert resolve(recipe, varied=["moe.selection_bias"]).moe.bias_rate == 5e-3
    scheduled = nested({"schedule.noise_scale": "linear:0.5"})
    assert resolve(scheduled, varied=["moe.router"]).schedule.noise_scale == "linear:0.5"
    with pytest.raises(
        UnreadError, match=r"moe.bias_rate=0.005 .* it needs moe.selection_bias=True"
    ):
        resolve(recipe, varied=["moe.top_k"])
