"""Counterfactuals against a model edited by hand, NumPy, or changes that must have no effect."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.moe import info_of
from cases.training import case_config, make, packed_batch, small_config
from moejax.cli import main
from moejax.config import ROUTER_RULES
from moejax.data import prepare
from moejax.inference.evaluate import evaluate_run
from moejax.inference.load import load_run
from moejax.inspection.analysis.trace import spread_rows
from moejax.inspection.counterfactuals import evaluate as evaluating
from moejax.inspection.counterfactuals import interventions, passes
from moejax.inspection.counterfactuals.evaluate import counterfactuals, read_rows
from moejax.inspection.counterfactuals.passes import Parts
from moejax.inspection.counterfactuals.plan import (
    CAPACITY_FACTORS,
    KINDS,
    NOT_SELECTABLE,
    OUTPUT_ZERO,
    Layers,
    extremes,
    most_similar,
    plan,
)
from moejax.inspection.counterfactuals.plan import random_pairs as draw_pairs
from moejax.inspection.counterfactuals.result import (
    CounterfactualError,
    Counterfactuals,
    Outcome,
    paired_change,
)
from moejax.inspection.counterfactuals.stacks import (
    bytes_per_intervention,
    most_at_once,
    stack_interventions,
)
from moejax.models.parameters import count_parameters
from moejax.models.placement import place_experts
from moejax.moe.expert_parallel.placement import identity_placement
from moejax.moe.layer import MoE
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.losses import forward_sums
from moejax.training.run_directory.layout import write_run_directory

N, E, K = 2, 4, 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run directory with a selection bias and random weights.

    The weights are large enough for routing to matter.
    """
    folder = tmp_path_factory.mktemp("counterfactuals")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["expert", "router", "token", "gate", "loss"], 40)
        (folder / f"{i}.txt").write_text(" ".join(words))
    config = small_config(
        data={
            "source": "files",
            "files": str(folder / "*.txt"),
            "directory": str(folder / "data"),
            "seq_len": 32,
        },
        moe={
            "router": "sigmoid_topk",
            "renormalize": False,
            "selection_bias": True,
            "grouped_matmul": "dense",
        },
        mesh={"data": 1},
    )
    setup = make(config)
    state = setup.init(0)
    for path, variable in nnx.to_flat_state(state.params):
        if "moe" in path:
            variable.set_value(variable[...] * 3)
    bias_NE = jnp.asarray(rng.normal(size=(N, E)) / 4, jnp.float32)
    for path, variable in nnx.to_flat_state(state.router_state):
        if "selection_bias" in path:
            variable.set_value(bias_NE)
    corpus = prepare(config.data)
    corpus.tokenizer.save(folder / "run")
    write_run_directory(
        folder / "run", config, count_parameters(config), corpus.directory.name, "test"
    )
    with Checkpoints(folder / "run", setup) as checkpoints:
        checkpoints.save(state)
    return folder / "run"


@pytest.fixture(scope="module")
def result(workdir):
    return counterfactuals(workdir, top_k=(1, 2), capacity_factors=(0.5, float(E)), num_pairs=1)


@pytest.fixture(scope="module")
def loaded(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def parts(loaded):
    return Parts(loaded.model)


@pytest.fixture(scope="module")
def batch(loaded):
    return packed_batch(loaded.config)


@jax.jit
def _nats(state, batch):
    return forward_sums(nnx.merge(_nats.graphdef, state), batch).nats


def nats_of(model, batch):
    """The loss of the model in one piece."""
    graphdef, state = nnx.split(model)
    if getattr(_nats, "graphdef", graphdef) != graphdef:
        raise ValueError("only models of one structure")
    _nats.graphdef = graphdef
    return float(_nats(state, batch))


def edited(model, edit):
    """A copy whose experts `edit` changes, in the one stack of all layers."""
    copy = nnx.merge(*nnx.split(model))
    (stack,) = copy.stacks
    edit(stack.block.ffn)
    return copy


def put(module, name, value):
    setattr(module, name, getattr(module, name).replace(value))


def run_alone(parts, batch, residuals, edits):
    """The pass of one intervention."""
    stacked = jax.tree.map(lambda array: np.asarray(array)[None], edits)
    (passed,) = parts.run_edited(batch, residuals, stacked, 1)
    return passed


def changed_nats(parts, batch, edits):
    return float(run_alone(parts, batch, parts.begin(batch), edits).nats_B.sum())


def at(parts, n, make_edit, *arguments):
    return {n: make_edit(parts.moes[n].config, *arguments)}


# What comes out
# -----------------------------------------------------------------------------


def test_as_trained_is_the_loss_of_an_evaluation(workdir, result):
    _, step, evaluation = evaluate_run(workdir)
    assert result.as_trained.loss == pytest.approx(evaluation.loss, rel=1e-6)
    assert (result.num_targets, result.step) == (evaluation.num_targets, step)
    assert result.num_rows == prepare(load_run(workdir).config.data).num_rows["validation"] > 8


def test_the_runs_own_k_and_a_capacity_for_all_change_nothing(result):
    by_k = {row.setting: row for row in result.of_kind("top_k")}
    assert list(by_k) == [1, 2]
    assert by_k[K].change == by_k[K].standard_error == 0
    assert by_k[K].loss == result.as_trained.loss
    assert all(row.change != 0 and row.standard_error > 0 for k, row in by_k.items() if k != K)
    tight, roomy = result.of_kind("capacity")
    assert (tight.setting, roomy.setting) == (0.5, E)
    assert abs(roomy.change) < 1e-6
    assert roomy.dropped == 0
    assert tight.change != 0
    assert 0.3 < tight.dropped < 1
    assert tight.gate_mass < roomy.gate_mass


def test_without_normalisation_the_gate_mass_grows_with_k(result):
    masses = [row.gate_mass for row in result.of_kind("top_k")]
    assert masses[1] - masses[0] > 0.05
    assert masses[K - 1] == pytest.approx(result.as_trained.gate_mass)


def test_every_expert_of_every_layer_is_ablated_in_both_ways(result):
    for way, change_NE in result.ablation_NE.items():
        assert change_NE.shape == (N, E)
        assert np.isfinite(change_NE).all()
        assert len(np.unique(change_NE)) == N * E
        row = next(
            row
            for row in result.of_kind("ablate")
            if (row.what, row.layer, row.experts) == (way, 1, (3,))
        )
        assert change_NE[1, 3] == row.change
        assert result.by_expert(way, "loss")[1, 3] == row.loss
        assert row.loss == pytest.approx(result.as_trained.loss + row.change, abs=1e-12)


def test_pairs_are_the_extremes_the_most_similar_and_some_at_random(result, loaded):
    for kind, first in (("swap", "busiest, rarest"), ("merge", "most similar")):
        rows = result.of_kind(kind)
        assert [(row.what, row.layer) for row in rows] == [
            (what, layer) for layer in range(N) for what in (first, "random pair")
        ]
        assert all(
            set(a.experts) != set(b.experts) for a, b in zip(rows[::2], rows[1::2], strict=True)
        )
    assert extremes(np.array([3, 9, 1, 9])) == (3, 2)
    assert extremes(np.ones(3, int)) == (2, 0)
    experts = loaded.model.stacks[0].block.ffn.experts
    whole_EP = np.concatenate(
        [np.asarray(w[...][0]).reshape(E, -1) for w in (experts.gate_up, experts.down)], axis=1
    )
    cosine_EE = whole_EP @ whole_EP.T / np.outer(*[np.linalg.norm(whole_EP, axis=1)] * 2)
    layer_0 = next(loaded.model.walk())[0].ffn
    np.testing.assert_allclose(interventions.similarity(layer_0.experts), cosine_EE, atol=1e-6)
    assert most_similar(np.array([[1, 0.2, 0.1], [0.2, 1, 0.7], [0.1, 0.7, 1]])) == (1, 2)


def test_pairs_drawn_at_random_differ_and_leave_out_the_chosen_one():
    pairs = draw_pairs(4, 99, [0, 1], without=(2, 1))
    assert len(set(pairs)) == len(pairs) == 5
    assert (1, 2) not in pairs
    assert draw_pairs(64, 2, [0, 1], without=(0, 1)) == draw_pairs(64, 2, [0, 1], without=(0, 1))
    assert draw_pairs(64, 2, [0, 1], without=(0, 1)) != draw_pairs(64, 2, [0, 2], without=(0, 1))


def test_random_and_uniform_routing_are_done_in_all_layers_and_in_each(result):
    for kind, mass in (("random", 1), ("uniform", 1)):
        rows = result.of_kind(kind)
        assert [row.layer for row in rows] == [None, 0, 1]
        assert len({row.change for row in rows}) == 3
        assert all(row.gate_mass == pytest.approx(mass) for row in rows)


# Each change against a model edited by hand
# -----------------------------------------------------------------------------


def test_layer_by_layer_is_the_model_in_one_piece(parts, loaded, batch):
    assert parts.run(batch).nats_B.sum() == pytest.approx(nats_of(loaded.model, batch), rel=1e-6)


@pytest.mark.parametrize(("layer", "expert"), [(0, 2), (1, 1)])
def test_an_ablation_is_the_model_with_that_expert_edited(parts, loaded, batch, layer, expert):
    def zero_output(moe):
        put(moe.experts, "down", moe.experts.down[...].at[layer, expert].set(0))

    def block(moe):  # the bias enters the ranking alone
        put(moe, "selection_bias", moe.selection_bias[...].at[layer, expert].set(-1e9))

    trained = nats_of(loaded.model, batch)
    for operate, edit in ((interventions.ablated, zero_output), (interventions.blocked, block)):
        expected = nats_of(edited(loaded.model, edit), batch)
        assert abs(expected - trained) > 0.01
        found = changed_nats(parts, batch, at(parts, layer, operate, expert))
        assert found == pytest.approx(expected, rel=1e-6)


def test_changes_in_two_layers_are_the_model_with_both_edited(parts, loaded, batch):
    def edit(moe):
        put(moe.experts, "down", moe.experts.down[...].at[0, 1].set(0).at[1, 3].set(0))

    both = at(parts, 0, interventions.ablated, 1) | at(parts, 1, interventions.ablated, 3)
    assert changed_nats(parts, batch, both) == pytest.approx(
        nats_of(edited(loaded.model, edit), batch), rel=1e-6
    )


def test_no_bias_is_the_model_with_a_bias_of_zero(parts, loaded, batch):
    def edit(moe):
        put(moe, "selection_bias", jnp.zeros_like(moe.selection_bias[...]))

    edits = {0: interventions.without_bias(), 1: interventions.without_bias()}
    found = changed_nats(parts, batch, edits)
    assert found == pytest.approx(nats_of(edited(loaded.model, edit), batch), rel=1e-6)
    assert found != pytest.approx(nats_of(loaded.model, batch), rel=1e-6)


def test_swapping_weights_equals_swapping_columns_of_the_router(parts, loaded, batch):
    order_E = np.array([3, 1, 2, 0])

    def edit(moe):
        put(
            moe.router,
            "kernel",
            moe.router.kernel[...].at[0].set(moe.router.kernel[...][0][:, order_E]),
        )
        put(
            moe,
            "selection_bias",
            moe.selection_bias[...].at[0].set(moe.selection_bias[...][0][order_E]),
        )

    found = changed_nats(parts, batch, at(parts, 0, interventions.swapped, 0, 3))
    assert found == pytest.approx(nats_of(edited(loaded.model, edit), batch), rel=1e-5)
    assert abs(found - nats_of(loaded.model, batch)) > 0.1


def test_swaps_that_cancel_and_merges_of_equal_experts_change_nothing(parts, batch):
    moe = parts.moes[0]
    swap = interventions.swapped(moe.config, 0, 2)
    merge = interventions.merged(moe.config, 1, 2)
    swapped_twice = swap.apply(swap.apply(moe))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(swapped_twice), nnx.state(moe))
    merged = merge.apply(moe)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(merge.apply(merged)), nnx.state(merged))
    trained = parts.run(batch).nats_B.sum()
    with_itself = at(parts, 0, interventions.swapped, 1, 1)
    assert changed_nats(parts, batch, with_itself) == trained
    assert changed_nats(parts, batch, {0: merge}) != trained


def test_merged_experts_both_have_the_mean_and_the_others_what_they_had(parts):
    moe = parts.moes[0]
    before, after = moe.experts, interventions.merged(moe.config, 3, 1).apply(moe).experts
    for name in ("gate_up", "down"):
        old, new = (np.asarray(getattr(experts, name)[...]) for experts in (before, after))
        for expert in (1, 3):
            np.testing.assert_allclose(new[expert], (old[1] + old[3]) / 2, rtol=1e-6)
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])


def test_an_intervention_leaves_the_layer_that_it_was_given_as_it_was(parts):
    moe = parts.moes[0]
    graphdef, before = nnx.split(moe)
    before = jax.device_get(before)
    edits = (
        interventions.swapped(moe.config, 0, 1),
        interventions.without_bias(),
        interventions.with_top_k(moe, 1),
        interventions.with_uniform_routing(moe),
    )
    for edit in edits:
        changed_graphdef, changed = nnx.split(edit.apply(moe))
        assert changed_graphdef != graphdef or any(
            (a != b).any()
            for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(before), strict=True)
        )
    after_graphdef, after = nnx.split(moe)
    assert graphdef == after_graphdef
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))


def layer_inputs(moe, width=32):
    rng = np.random.default_rng(5)
    mask_BL = rng.random((2, 16)) < 0.9
    x_BLD = jnp.asarray(rng.normal(size=(2, 16, width)), jnp.float32)
    return x_BLD, info_of(moe.config, mask_BL, trace=True)


def test_uniform_routing_is_the_mean_of_a_loop_over_experts(parts):
    moe = nnx.merge(*nnx.split(parts.moes[1]))
    moe.config = dataclasses.replace(
        moe.config, dispatch="capacity", eval_capacity_factor=0.5
    )  # which makes no difference
    moe = interventions.with_uniform_routing(moe).apply(moe)
    x_BLD, info = layer_inputs(moe)
    y_BLD, stats = jax.jit(moe)(x_BLD, info)
    gate_up_EDPF, down_EFD = (
        np.asarray(w[...], np.float64) for w in (moe.experts.gate_up, moe.experts.down)
    )
    expected_BLD = np.zeros(x_BLD.shape)
    for b, position in np.argwhere(np.asarray(info.is_token_BL)):
        for e in range(E):
            expected_BLD[b, position] += (
                oracle.swiglu(np.asarray(x_BLD[b, position]), gate_up_EDPF[e], down_EFD[e]) / E
            )
    np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-4, atol=1e-5)
    assert stats.dropped == 0


def test_random_routing_draws_k_different_experts_evenly_with_equal_weights(parts):
    moe = interventions.with_random_routing(parts.moes[0]).apply(parts.moes[0])
    x_BLD, info = layer_inputs(moe)
    stats = jax.jit(lambda x, info: moe(x, info)[1])(x_BLD, info)
    mask_T = np.asarray(info.is_token_BL).ravel()
    experts_TK, weights_TK = (
        np.asarray(a)[mask_T] for a in (stats.routing.experts_TK, stats.routing.weights_TK)
    )
    assert experts_TK.shape[1] == K
    assert all(len(set(row)) == K for row in experts_TK.tolist())
    np.testing.assert_allclose(weights_TK, 1 / K)
    load_E = np.bincount(experts_TK.ravel(), minlength=E) / experts_TK.size
    assert np.abs(load_E - 1 / E).max() < 0.15


def test_ablating_other_experts_and_layers_compiles_nothing(parts, batch):
    batch = jax.tree.map(lambda x: x[:3], batch)  # a shape that nothing was compiled for yet
    residuals = parts.begin(batch)

    def run_stack(n, make_edit, *arguments):
        edits = [at(parts, n, make_edit, expert, *arguments) for expert in range(E)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *edits)
        return parts.run_edited(batch, residuals, stacked, E)

    for make_edit in (interventions.blocked, interventions.ablated):
        run_stack(0, make_edit)
    run_stack(0, interventions.swapped, 0)
    before = passes._apply._cache_size()
    for n in range(N):
        run_stack(n, interventions.blocked)
        run_stack(n, interventions.ablated)
        run_stack(n, interventions.merged, 1)
    assert passes._apply._cache_size() == before


# Many at once
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["vmap", "in turn"])
def test_interventions_in_stacks_give_what_each_gives_alone(parts, loaded, batch, at_once):
    load_NE = np.stack([traffic.load_E for traffic in parts.run(batch).traffic.values()])
    planned, _ = plan(Layers(parts.moes, range(N), load_NE), KINDS, num_pairs=1)
    stacks = stack_interventions(planned, 3)
    residuals = parts.begin(batch)
    stacked_parts = Parts(loaded.model, at_once)
    for stack in stacks:
        together = stacked_parts.run_edited(batch, residuals, stack.edits, len(stack.places))
        for place, passed in zip(stack.places, together, strict=True):
            alone = run_alone(parts, batch, residuals, planned[place].edits)
            np.testing.assert_allclose(passed.nats_B, alone.nats_B, rtol=1e-6)
            assert passed.traffic.keys() == alone.traffic.keys() == planned[place].edits.keys()
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                passed.traffic,
                alone.traffic,
            )


def test_stacks_are_of_equal_size_and_hold_every_intervention_once(parts):
    planned, _ = plan(Layers(parts.moes, range(N), np.ones((N, E), int)), KINDS)
    for most in (1, 3, 100):
        stacks = stack_interventions(planned, most)
        places = [place for stack in stacks for place in dict.fromkeys(stack.places)]
        assert sorted(places) == list(range(len(planned)))
        assert max(len(stack.places) for stack in stacks) <= most
    by_size = {}
    for stack in stack_interventions(planned, 3):
        kinds = {(planned[place].kind, planned[place].what) for place in stack.places}
        by_size.setdefault(len(stack.places), set()).update(kinds)
    # Four ablations of a layer are two stacks of two; of five factors the last is there twice.
    assert {kind for kind, _ in by_size[2]} == {"ablate", "top_k"}
    assert {kind for kind, _ in by_size[3]} == {"capacity", "swap", "merge"}
    assert stack_interventions(planned, 100)[0].places  # all that fit


def test_memory_for_a_stack_grows_with_the_batch_and_always_holds_one(parts, batch, monkeypatch):
    small = jax.tree.map(lambda x: x[:1], batch)
    assert bytes_per_intervention(parts, batch) > bytes_per_intervention(parts, small) > 0
    assert most_at_once(parts, small) >= most_at_once(parts, batch) > 1
    monkeypatch.setattr("moejax.inspection.counterfactuals.stacks.MEMORY", 1)
    assert most_at_once(parts, batch) == 1


# What is left out
# -----------------------------------------------------------------------------


def layers_of(config):
    """The MoE layers of a model; whatever they hold is 2."""

    def make(moe):
        return MoE(
            moe,
            32,
            jnp.dtype("float32"),
            vocab_size=320,
            active_top_k=2 if scheduled else None,
            rngs=nnx.Rngs(0),
        )

    scheduled = config.schedule.top_k != "constant"
    moes = []
    for kind in filter(None, config.layers):
        graphdef, state = nnx.split(nnx.eval_shape(lambda kind=kind: make(kind)))
        moes.append(
            nnx.merge(graphdef, jax.tree.map(lambda x: jnp.full(x.shape, 2, x.dtype), state))
        )
    return Layers(moes, config.moe_layers, np.ones((len(moes), config.moe.num_choices), int))


LEFT_OUT = {
    # Groups of two experts, of which a token visits one.
    "softmax_topk": {"top_k: K=3", "top_k: K=4"},
    "switch": {"bias_off"},
    "noisy_topk": {"bias_off"},
    "sigmoid_topk": {"top_k: K=3", "top_k: K=4"},
    "cosine": {"bias_off"},
    "sparse_mixer": {"bias_off"},
    "sinkhorn": {"bias_off"},
    "quantile": {"top_k: K=4"},
    "hierarchical": {"bias_off", *(f"top_k: K={k}" for k in (1, 3, 5, 6, 7, 8))},
    "hash": {"bias_off", "top_k: K=3", "top_k: K=4", "ablate: not selectable"},
    "random": {"bias_off"},
    "balanced": {"bias_off", "ablate: not selectable"},
    "expert_choice": {"bias_off", "capacity", "ablate: not selectable"},
    "soft": {
        "bias_off",
        "capacity",
        "random",
        "ablate: not selectable",
        *(f"top_k: K={k}" for k in (1, 2, 3, 4)),
    },
    "dense": {"bias_off"},
}


@pytest.mark.parametrize("router", ROUTER_RULES)
def test_what_a_router_cannot_do_is_left_out_and_the_rest_is_possible(router):
    config = case_config(router, model={"num_layers": 1})
    layers = layers_of(config)
    changes, left_out = plan(layers, KINDS)
    assert set(left_out) == LEFT_OUT[router]
    moe = layers.moes[0]
    info = info_of(moe.config, np.ones((2, 16), bool))
    x_BLD = jnp.zeros((2, 16, 32))
    most = min(moe.config.num_choices, 2 * moe.config.top_k)
    asked = {change.what.removeprefix("K = ") for change in changes if change.kind == "top_k"}
    asked |= {key.removeprefix("top_k: K=") for key in left_out if key.startswith("top_k")}
    assert asked == {str(k) for k in range(1, most + 1)}
    kinds = set(KINDS) - set(left_out) - ({"top_k"} if router == "soft" else set())
    assert {change.kind for change in changes} == kinds
    # Those that depend on the router, one of each, for the others are alike.
    done = {
        (change.kind, change.setting, change.what == OUTPUT_ZERO): change for change in changes
    }.values()
    graphdef, state = nnx.split(moe)
    for change in done:
        if (
            change.kind in ("top_k", "capacity", "ablate", "random", "uniform")
            and change.setting not in CAPACITY_FACTORS[1:]
        ):

            def run(state, x_BLD, info, edit):
                info = dataclasses.replace(info, overrides=edit.overrides)
                return edit.apply(nnx.merge(graphdef, state))(x_BLD, info)[0]

            edited = jax.eval_shape(run, state, x_BLD, info, change.edits[0])
            assert edited.shape == x_BLD.shape


def test_in_a_model_of_different_layers_each_change_is_done_where_it_can_be():
    layers = layers_of(case_config("layers that differ"))  # hash, dense, K = 1
    changes, left_out = plan(layers, KINDS, top_k=(1, 3))
    assert left_out["ablate: not selectable"] == (
        "layer 0: moe.router=hash ranks no expert after those that a token visits"
    )
    assert "layer 0: K=3 must be between 1 and 2" in left_out["top_k: K=3"]
    by_k = {change.setting: sorted(change.edits) for change in changes if change.kind == "top_k"}
    assert by_k == {1: [0, 1], 3: [1]}
    ablated = {(change.what, change.layer) for change in changes if change.kind == "ablate"}
    assert ablated == {(OUTPUT_ZERO, 0), (OUTPUT_ZERO, 2), (NOT_SELECTABLE, 2)}


def test_a_scheduled_k_counts_and_all_but_identity_experts_are_ablated():
    layers = layers_of(case_config("schedules"))
    assert interventions.chosen_per_token(layers.moes[0]) == 2  # of the state, above
    edit = interventions.with_top_k(layers.moes[0], 3)
    assert edit.overrides.active_top_k == 3
    edited = edit.apply(layers.moes[0])
    assert (edited.config.top_k, edited.active_top_k) == (4, None)
    layers = layers_of(case_config("experts", model={"num_layers": 1}))
    changes, left_out = plan(layers, ["ablate"])
    assert left_out == {"ablate: output 0": "the output of identity experts is the token"}
    assert len(changes) == 2 * 8 - 1


# Numbers and files
# -----------------------------------------------------------------------------


def test_the_standard_error_is_that_of_a_ratio_of_sums():
    # Differences 1 and 3 on 10 targets each: 4 / 20 = 0.2; residuals -1 and 1; sqrt(2 / 1 * 2)
    # / 20 = 0.1.
    change, error = paired_change(np.array([5.0, 9]), np.array([4.0, 6]), np.array([10.0, 10]))
    assert (change, error) == (pytest.approx(0.2), pytest.approx(0.1))
    # The same difference for every target is no noise, and rows without targets (padding) do
    # not count.
    targets_R = np.array([10.0, 20, 0])
    change, error = paired_change(np.array([3.0, 6, 0]), np.array([2.0, 4, 0]), targets_R)
    assert (change, error) == (pytest.approx(0.1), pytest.approx(0.0))
    assert np.isnan(paired_change(np.array([3.0, 0]), np.array([2.0, 0]), np.array([5.0, 0]))[1])


def test_the_standard_error_is_the_deviation_over_samples_of_rows():
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(400):
        targets_R = rng.integers(5, 30, 40).astype(float)
        base_R = rng.normal(2, 1, 40) * targets_R  # what rows have in common cancels
        samples.append(
            paired_change(base_R + rng.normal(0.1, 0.2, 40) * targets_R, base_R, targets_R)
        )
    changes, errors = np.array(samples).T
    assert errors.mean() == pytest.approx(changes.std(), rel=0.15)


def test_rows_are_spread_over_the_split_and_padding_fills_the_last_batch(loaded):
    corpus = prepare(loaded.config.data, loaded.tokenizer)
    rows = corpus.rows("validation")
    batches = read_rows(corpus, 6, 4, seed=3)
    assert [batch.tokens_BL.shape for batch in batches] == [(4, 32), (4, 32)]
    for place, row in enumerate(spread_rows(len(rows), 6, 3)):
        batch = batches[place // 4]
        np.testing.assert_array_equal(batch.tokens_BL[place % 4], rows[int(row)]["tokens"][:-1])
    assert not batches[1].loss_mask_BL[2:].any()
    assert batches[1].loss_mask_BL[:2].any()
    (small,) = read_rows(corpus, 2, 4)
    assert small.tokens_BL.shape == (2, 32)  # without rows of padding
    with pytest.raises(
        CounterfactualError, match=f"between 1 and the {len(rows)} of the validation split"
    ):
        read_rows(corpus, len(rows) + 1, 4)


def test_a_result_survives_its_file_and_a_damaged_one_is_refused(result, tmp_path):
    path = result.save(tmp_path / "c.json")
    assert Counterfactuals.load(path) == result
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]
    values = json.loads(path.read_text())
    odd = dataclasses.replace(
        result, rows=(dataclasses.replace(result.rows[0], standard_error=float("nan")),)
    )
    assert np.isnan(Counterfactuals.load(odd.save(tmp_path / "odd.json")).rows[0].standard_error)
    damages = [
        "[",
        "[]",
        "{}",
        json.dumps(values | {"layers": [0]}),
        json.dumps(values | {"rows": values["rows"][1:]}),
    ]
    for text in damages:
        path.write_text(text)
        with pytest.raises(
            CounterfactualError, match=r"c.json is damaged .*run `moejax counterfactuals` again"
        ):
            Counterfactuals.load(path)
    with pytest.raises(CounterfactualError, match="is missing"):
        Counterfactuals.load(tmp_path / "none.json")


def test_tables_hold_every_outcome_and_escape_text(result):
    text, html, frame = repr(result), result._repr_html_(), result.to_frame()
    assert len(frame) == len(result.rows)
    assert frame["change"][3] == result.rows[3].change
    assert all(
        f"{row.change:+.4f}" in text and f"{row.change:+.4f}" in html for row in result.rows[1:]
    )
    odd = dataclasses.replace(result, left_out={"<b>": "a & b"})
    odd = dataclasses.replace(odd, rows=(dataclasses.replace(result.rows[0], what="<script>"),))
    assert "<script>" not in odd._repr_html_()
    assert "&lt;b&gt;: a &amp; b" in odd._repr_html_()
    assert "left out: <b>: a & b" in repr(odd)
    summary = {(row["layer"], row["expert"]): row for row in result.summary()}
    change_E = result.ablation_NE[OUTPUT_ZERO][1]
    most = int(change_E.argmax())
    assert summary["1", OUTPUT_ZERO]["largest"].startswith(f"{change_E[most]:+.4f} ±")
    assert summary["1", OUTPUT_ZERO]["largest"].endswith(f"({most})")


def test_a_change_is_noise_within_two_standard_errors():
    outcome = Outcome("swap", "", 0, (), None, 1.0, -0.3, 0.1, 1.0, 0.0)
    assert not outcome.is_noise
    assert dataclasses.replace(outcome, change=0.2).is_noise
    assert dataclasses.replace(outcome, standard_error=float("nan")).is_noise


def test_progress_counts_seconds_from_the_second_batch_on():
    assert evaluating._progress(7, 10, 5, 60.0).startswith("batch 1 of 5: 7 of 10 changes")
    # 10 of the 40 changes after the first batch took 20 s: the other 30 will take 60 s.
    assert evaluating._progress(20, 10, 5, 20.0) == "batch 2 of 5; about 60 s left"


def test_requests_that_make_no_sense_are_refused(loaded, monkeypatch):
    with pytest.raises(
        CounterfactualError, match=r"'swop' must be one of top_k, .*the nearest is swap"
    ):
        counterfactuals(loaded, kinds=["swop"])
    with pytest.raises(CounterfactualError, match="no kind of change is named"):
        counterfactuals(loaded, kinds=[])
    with pytest.raises(CounterfactualError, match="step=7 is not that of the loaded run, 0"):
        counterfactuals(loaded, step=7)
    dense = dataclasses.replace(loaded, config=small_config(moe={"num_experts": 0}))
    with pytest.raises(CounterfactualError, match="dense model"):
        counterfactuals(dense)
    placed, _ = place_experts(loaded.model, identity_placement(N, E))
    with pytest.raises(CounterfactualError, match="placed elsewhere"):
        Parts(placed)


# The command
# -----------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_the_file(workdir, tmp_path, capsys):
    table = tmp_path / "table.csv"
    command = [
        "counterfactuals",
        f"--workdir={workdir}",
        "--rows=4",
        "--kinds=swap,ablate,bias_off",
    ]
    assert main([*command, f"--csv={table}"]) == 0
    printed = capsys.readouterr().out
    saved = Counterfactuals.load(workdir / "counterfactuals.json")
    assert saved.num_rows == 4
    assert {row.kind for row in saved.rows} == {
        "as trained",
        "swap",
        "ablate",
        "bias_off",
    }
    for row in saved.rows[1:]:
        assert row.kind == "ablate" or f"{row.change:+.4f} ± {row.standard_error:.4f}" in printed
    assert "swap busiest, rarest" in printed
    assert "output 0" in printed
    lines = table.read_text().splitlines()
    assert lines[0].startswith("kind,what,layer,experts,setting,loss,change")
    assert len(lines) == len(saved.rows) + 1
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved.to_dict()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kinds=swop"], "the nearest is swap"),
        (["--rows=9999"], "9999 rows must be between 1 and"),
        (["--step=5"], "holds no step 5"),
        (["--csv=nowhere/table.csv"], "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line(workdir, flags, words, capsys):
    assert main(["counterfactuals", f"--workdir={workdir}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err.strip().splitlines()[-1]
