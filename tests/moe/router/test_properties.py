"""What every router promises, whatever its formula; each test runs for all of them through a MoE
layer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import oracle
from cases.moe import info_of
from cases.training import LIKE_SIGMOID, ROUTER_CASES, one_for_each_function
from moejax.config import ROUTER_RULES, ConfigError, MoeConfig, resolve
from moejax.config.sections.moe import derive_moe
from moejax.moe.balancing.losses import LOSSES, auxiliary_losses
from moejax.moe.layer import MoE
from moejax.moe.router import ROUTERS
from moejax.moe.router.modules import RouterState
from moejax.moe.router.routing import Routing
from moejax.sharding import MESH_AXES

B, L, D = 3, 12, 8
TOKEN_CHOICE = [name for name, rules in ROUTER_RULES.items() if rules.takes_capacity]
CAUSAL = [name for name, rules in ROUTER_RULES.items() if rules.is_causal]
LEARNED = [name for name in ROUTER_RULES if name not in ("random", "balanced")]
SAME_FOR_A_PERMUTATION = [
    name for name in CAUSAL if name not in ("random", "balanced", "noisy_topk", "sparse_mixer")
]
CAPACITIES = [
    {"dispatch": "capacity", "overflow": overflow, "capacity_factor": 0.8}
    for overflow in ("next", "renormalize", "drop")
]


def each(routers, rarely=LIKE_SIGMOID):
    """A case for each router; those of `rarely` are in the long suite only."""
    return pytest.mark.parametrize("router", one_for_each_function(routers, rarely))


def test_routers_that_are_rarely_tried_are_one_function_with_one_that_always_is():
    assert {ROUTERS[router] for router in LIKE_SIGMOID} == {ROUTERS["sigmoid_topk"]}


all_routers = each(ROUTER_RULES)
modes = pytest.mark.parametrize("training", [True, False])


def config_of(router, **changes):
    case = (
        {"num_experts": 4, "top_k": 2, "d_expert": 6, "router": router}
        | ROUTER_CASES[router]
        | changes
    )
    return derive_moe(MoeConfig(**case), L)


def fits(config):
    """Whether the router can treat overflow so."""
    if config.overflow == "next":
        return config.score != "uniform" and config.router not in ("sparse_mixer", "hierarchical")
    return config.overflow != "renormalize" or config.top_k > 1


def fresh(config):
    """A layer with its initial weights."""
    return MoE(config, D, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=1))


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, state, x_BLD, info):
    return nnx.merge(graphdef, state)(x_BLD, info)


def apply(layer, x_BLD, info):
    """`apply(layer, x_BLD, info)`, compiled once for each structure and shape."""
    return _apply(*nnx.split(layer), x_BLD, info)


@functools.cache
def parts(config):
    """A layer with large router parameters and a selection bias, and its compiled run."""
    layer = fresh(config)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    rng = np.random.default_rng(0)
    if "router" in params:  # random and balanced have no logits
        params["router"] = jax.tree.map(
            lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype), params["router"]
        )
    if config.has_selection_bias:
        rest["selection_bias"].set_value(
            jnp.asarray(rng.normal(size=config.num_choices) / 4, jnp.float32)
        )

    @functools.partial(jax.jit, static_argnames=("training",))
    def run(params, x_BLD, mask_BL, keys_B, training):
        factor = config.capacity_factor if training else None
        info = info_of(config, mask_BL, factor, keys_B if training else None, trace=True)
        y_BLD, stats = nnx.merge(graphdef, params, rest)(x_BLD, info)
        return y_BLD, stats

    return params, run


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), B)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32), rng.random((B, L)) < 0.85


def run(config, x_BLD, mask_BL, training, keys_B=None):
    params, call = parts(config)
    return call(
        params, x_BLD, jnp.asarray(mask_BL), keys() if keys_B is None else keys_B, training=training
    )


# Weights and choices
# ----------------------------------------------------------------------------------------------


@each(TOKEN_CHOICE)
@modes
def test_no_token_visits_an_expert_twice_and_masked_tokens_visit_none(router, training):
    config = config_of(router)
    x_BLD, mask_BL = draw()
    y_BLD, stats = run(config, x_BLD, mask_BL, training)
    assert isinstance(stats.routing, Routing)
    experts_TK, weights_TK = (
        np.asarray(stats.routing.experts_TK),
        np.asarray(stats.routing.weights_TK),
    )
    mask_T = mask_BL.ravel()
    assert all(
        len(set(row)) == config.top_k and max(row) < config.num_choices
        for row in experts_TK[mask_T].tolist()
    )
    assert np.all(experts_TK[~mask_T] == config.num_choices) and not weights_TK[~mask_T].any()
    assert not np.asarray(y_BLD)[~mask_BL].any()
    assert stats.assignments_E.sum() == mask_T.sum() * config.top_k


@each(TOKEN_CHOICE)
@modes
def test_weights_sum_as_promised(router, training):
    config = config_of(router)
    weights_TK = np.asarray(
        run(config, draw()[0], np.ones((B, L), bool), training)[1].routing.weights_TK
    )
    sums_T = weights_TK.sum(axis=1) / config.route_scale
    if router == "sparse_mixer":
        assert np.all(sums_T > 0) and np.all(weights_TK <= 1)
    elif config.renormalize or config.score in ("softmax_after", "uniform"):
        np.testing.assert_allclose(sums_T, 1, rtol=1e-5)
    else:
        assert np.all(sums_T <= config.top_k) and np.all(weights_TK > 0)
    assert np.all(weights_TK >= 0)


@each([name for name, rules in ROUTER_RULES.items() if rules.takes_bias] + ["quantile"])
def test_the_selection_bias_changes_choices_and_never_the_weight_of_a_chosen_expert(router):
    config = (
        config_of(router)
        if router == "quantile"
        else config_of(router, selection_bias=True, renormalize=False)
    )
    if config.score == "softmax_after":
        config = dataclasses.replace(config, score="softmax")
    config = dataclasses.replace(
        config, renormalize=False, num_groups=1, top_k_groups=1, dispatch="dropless"
    )
    layer = fresh(config)
    x_BLD, mask_BL = draw()
    found = []
    for bias_E in (np.zeros(4), np.array([5.0, -5.0, 3.0, -3.0])):
        layer.selection_bias[...] = jnp.asarray(bias_E, jnp.float32)
        routing = apply(layer, x_BLD, info_of(config, mask_BL, trace=True))[1].routing
        found.append(routing)
    plain, biased = found
    assert np.any(plain.experts_TK != biased.experts_TK)
    assert set(np.asarray(biased.experts_TK)[mask_BL.ravel()].ravel()) <= {0, 2}
    scores_TE = np.exp(np.asarray(plain.log_scores_TE)) * config.route_scale
    for routing in found:
        for t in np.flatnonzero(mask_BL):
            np.testing.assert_allclose(
                routing.weights_TK[t], scores_TE[t, routing.experts_TK[t]], rtol=1e-5
            )


@each([name for name, rules in ROUTER_RULES.items() if rules.takes_groups])
@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_no_expert_outside_the_chosen_groups_wins_however_negative_the_bias(router, group_score):
    how = {
        "num_experts": 8,
        "num_groups": 4,
        "top_k_groups": 1,
        "group_score": group_score,
        "selection_bias": True,
    }
    config = config_of(router, top_k=1 if router == "switch" else 2, **how)
    layer = fresh(config)
    layer.selection_bias[...] = jnp.asarray(
        np.random.default_rng(0).normal(size=8) - 50, jnp.float32
    )
    x_BLD, mask_BL = draw()
    experts_TK = np.asarray(
        apply(layer, x_BLD, info_of(config, mask_BL, trace=True))[1].routing.experts_TK
    )
    assert np.all(experts_TK[mask_BL.ravel()] // 2 == experts_TK[mask_BL.ravel()][:, :1] // 2)


# Independence
# --------------------------------------------------------------------------------------------------


@all_routers
@modes
def test_what_stands_at_padding_changes_nothing_be_it_no_number(router, training):
    config = config_of(router)
    x_BLD, mask_BL = draw()
    garbage_BLD = jnp.where(
        jnp.asarray(mask_BL)[..., None], x_BLD, jnp.where(draw(1)[0] > 0, jnp.nan, jnp.inf)
    )
    one, other = (run(config, x, mask_BL, training) for x in (x_BLD, garbage_BLD))
    np.testing.assert_array_equal(one[0], other[0])
    sums = (dataclasses.replace(stats, routing=None) for _, stats in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *sums)
    assert not np.asarray(one[0])[~mask_BL].any()


@all_routers
def test_padding_appended_changes_nothing_in_evaluation(router):
    if router in ("expert_choice", "soft"):
        pytest.skip("its slots follow from the length of the sequence")
    config = config_of(router)
    x_BLD, mask_BL = draw()
    longer_BLD = jnp.concatenate([x_BLD, 9 * draw(1)[0]], axis=1)
    longer_BL = np.concatenate([mask_BL, np.zeros((B, L), bool)], axis=1)
    # Token ids and positions as in the short rows.
    info, short = info_of(config, longer_BL), info_of(config, mask_BL)
    ids = {
        name: jnp.concatenate([getattr(short, name)] * 2, axis=1)
        for name in ("tokens_BL", "positions_BL")
    }
    info, layer = dataclasses.replace(info, **ids), fresh(config)
    (y_BLD, stats), (longer_y_BLD, longer_stats) = (
        apply(layer, x_BLD, short),
        apply(layer, longer_BLD, info),
    )
    oracle.assert_close(longer_y_BLD[:, :L], y_BLD)
    assert not np.asarray(longer_y_BLD)[:, L:].any()
    sums = (dataclasses.replace(s, quantile_margins_TE=None) for s in (longer_stats, stats))
    oracle.assert_close(*sums)


@each(CAUSAL)
@pytest.mark.parametrize("capacity", ["dropless", "evaluation", "full"])
def test_a_causal_router_never_looks_at_later_tokens(router, capacity):
    training = capacity != "evaluation"  # which is dropless whatever training does
    config = config_of(router, dispatch="dropless")
    if (
        capacity == "full"
    ):  # what becomes of the overflow, the most entangled rule that the router allows
        full = [config_of(router, **changes, capacity_order="position") for changes in CAPACITIES]
        config = next(filter(fits, full))
    x_BLD, mask_BL = draw()
    cut = L // 2
    changed_BLD = jnp.concatenate([x_BLD[:, :cut], draw(1)[0][:, cut:]], axis=1)
    changed_BL = np.concatenate([mask_BL[:, :cut], draw(1)[1][:, cut:]], axis=1)
    y_BLD, _ = run(config, x_BLD, mask_BL, training)
    changed_y_BLD, _ = run(config, changed_BLD, changed_BL, training)
    oracle.assert_close(changed_y_BLD[:, :cut], y_BLD[:, :cut])
    assert np.any(changed_y_BLD[:, cut:] != y_BLD[:, cut:])


@each(["sinkhorn", "expert_choice", "soft"])
def test_the_routers_that_are_refused_in_causal_models_do_look_at_later_tokens(router):
    assert not ROUTER_RULES[router].is_causal
    config = config_of(router)
    x_BLD, full = draw()[0], np.ones((B, L), bool)
    cut = L // 2
    changed_BLD = jnp.concatenate([x_BLD[:, :cut], 3 * draw(1)[0][:, cut:]], axis=1)
    one, other = (run(config, x, full, True)[0][:, :cut] for x in (x_BLD, changed_BLD))
    assert np.abs(one - other).max() > 1e-3


@all_routers
@modes
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(router, training):
    config = config_of(router)
    x_BLD, mask_BL = draw()
    others_BLD, others_BL = draw(1)
    one = run(config, x_BLD, mask_BL, training)[0]
    beside_others = run(
        config,
        x_BLD.at[1:].set(others_BLD[1:]),
        np.concatenate([mask_BL[:1], others_BL[1:]]),
        training,
    )[0]
    oracle.assert_close(beside_others[0], one[0])
    assert np.any(beside_others[1:] != one[1:])


@each(SAME_FOR_A_PERMUTATION)
def test_permuted_tokens_are_routed_as_before_where_nothing_is_drawn_and_nothing_overflows(router):
    config = config_of(router, dispatch="dropless", jitter=0.0)
    x_BLD, mask_BL = draw()
    order = np.random.default_rng(2).permutation(L)
    layer = fresh(config)
    info = info_of(config, mask_BL)
    permuted = dataclasses.replace(
        info, is_token_BL=info.is_token_BL[:, order], tokens_BL=info.tokens_BL[:, order]
    )
    (y_BLD, stats), (permuted_BLD, permuted_stats) = (
        apply(layer, x_BLD, info),
        apply(layer, x_BLD[:, order], permuted),
    )
    oracle.assert_close(permuted_BLD, y_BLD[:, order])
    sums = (dataclasses.replace(s, quantile_margins_TE=None) for s in (permuted_stats, stats))
    oracle.assert_close(*sums)


SYMMETRIC = [
    "softmax_topk",
    "switch",
    "sigmoid_topk",
    "noisy_topk",
    "sparse_mixer",
    "sinkhorn",
    "quantile",
    "dense",
]


@each(SYMMETRIC)
def test_experts_in_another_order_give_the_same_output(router):
    config = config_of(router, dispatch="dropless", num_groups=1, top_k_groups=1, router_bias=False)
    layer = fresh(config)
    rng = np.random.default_rng(0)

    def large(p):
        return jnp.asarray(rng.normal(size=p.shape), p.dtype) if p.dtype == jnp.float32 else p

    nnx.update(layer, jax.tree.map(large, nnx.state(layer)))
    x_BLD, mask_BL = draw()
    y_BLD, stats = apply(layer, x_BLD, info_of(config, mask_BL))
    order = np.array([2, 0, 3, 1])

    def permute(path, value):
        if path[0] == "router":
            return value[..., order]
        return (
            value[order]
            if path[0] == "experts" or path[0] in ("selection_bias", "idle_steps")
            else value
        )

    flat = nnx.to_flat_state(nnx.state(layer))
    nnx.update(layer, nnx.from_flat_state([(p, v.replace(permute(p, v[...]))) for p, v in flat]))
    permuted_BLD, permuted_stats = apply(layer, x_BLD, info_of(config, mask_BL))
    oracle.assert_close(permuted_BLD, y_BLD)
    assert permuted_stats.assignments_E.tolist() == stats.assignments_E[order].tolist()


# Beside them all steps of tests/training/test_routers.py; these draw, look at whole sequences, or
# stop gradients.
ON_A_MESH = ("sparse_mixer", "sinkhorn", "random")


@each(
    [
        name
        for name in ROUTER_RULES
        if name not in ("noisy_topk", "sigmoid_topk", "quantile", "expert_choice", "soft")
    ],
    rarely=ROUTER_RULES.keys() - ON_A_MESH,
)
def test_on_a_mesh_the_layer_and_its_gradients_are_those_of_one_device(router):
    config = config_of(router)
    params, call = parts(config)
    x_BLD, mask_BL = (jnp.concatenate([a, b[:1]]) for a, b in zip(draw(), draw(1), strict=True))
    keys_B = jax.random.split(jax.random.key(0), 4)

    def loss(params, x_BLD):
        y_BLD, stats = call.__wrapped__(params, x_BLD, mask_BL, keys_B, True)
        return jnp.sum(y_BLD**2), (
            y_BLD,
            dataclasses.replace(stats, routing=None, quantile_margins_TE=None, scope_balance=None),
        )

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    one = jax.device_get(jax.jit(run)(params, x_BLD))
    mesh = jax.make_mesh((2, 1, 1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    with jax.set_mesh(mesh):
        many = jax.device_get(jax.jit(run)(params, x_BLD))
    oracle.assert_close(many, one, rtol=5e-5)


# Evaluation and training
# ------------------------------------------------------------------------------------------


@all_routers
def test_evaluation_needs_no_key_and_training_follows_its_key(
    router,
):
    config = config_of(router)
    x_BLD, mask_BL = draw()
    one, other = (run(config, x_BLD, mask_BL, False, keys(seed))[0] for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    same, again, new = (run(config, x_BLD, mask_BL, True, keys(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert config.draws == bool(np.any(same != new))


@each(LEARNED)
def test_the_task_alone_teaches_the_router(router):
    config = config_of(router)
    params, call = parts(config)
    x_BLD, mask_BL = draw()
    cotangent_BLD = draw(5)[0]

    def loss(params):
        y_BLD, _ = call(params, x_BLD, jnp.asarray(mask_BL), keys(), training=True)
        return jnp.sum(cotangent_BLD * y_BLD)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)["router"]):
        assert np.abs(gradient).max() > 1e-4, path


@all_routers
def test_losses_and_statistics_are_float32_and_state_is_no_parameter(router):
    config = config_of(router)
    layer = MoE(config, D, jnp.dtype("bfloat16"), vocab_size=7, rngs=nnx.Rngs(params=1))
    x_BLD, mask_BL = draw()
    info = info_of(config, mask_BL, config.capacity_factor, keys())
    y_BLD, stats = jax.eval_shape(
        _apply.__wrapped__, *nnx.split(layer), x_BLD.astype(jnp.bfloat16), info
    )
    assert y_BLD.dtype == jnp.bfloat16
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(stats))
    states = [v for _, v in nnx.to_flat_state(nnx.state(layer, RouterState))]
    assert states and all(v[...].dtype in (jnp.float32, jnp.int32) for v in states)
    assert not {id(v) for v in states} & {
        id(v) for _, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }


@all_routers
def test_the_balance_loss_of_every_router_is_at_least_its_floor_and_every_loss_is_finite(router):
    config = config_of(router)
    x_BLD, mask_BL = draw()
    _, stats = run(config, x_BLD, mask_BL, True)
    stacked = jax.tree.map(
        lambda x: x[None], dataclasses.replace(stats, routing=None, quantile_margins_TE=None)
    )
    losses = auxiliary_losses(stacked, config)
    assert {"balance", "z"} <= losses.keys() <= LOSSES.keys()
    for name, loss in losses.items():
        assert np.all(np.isfinite(loss.value_N)) and np.all(np.isfinite(loss.term_N)), name
    if config.score == "uniform":
        np.testing.assert_allclose(losses["balance"].value_N, 1, rtol=1e-5)
    assert losses["balance"].value_N[0] > 0.5


NONCAUSAL = {"router": "expert_choice", "allow_noncausal": True}


@pytest.mark.parametrize(
    ("moe", "parts"),
    [
        (
            NONCAUSAL | {"balance_convention": "first_choice"},
            ["moe.balance_convention=first_choice", "expert_choice"],
        ),
        (NONCAUSAL | {"balance_scope": "sequence"}, ["moe.balance_scope=sequence", "set global"]),
        (
            {"router": "soft", "allow_noncausal": True, "route_scale": 2.0},
            ["moe.route_scale=2.0", "moe.router=soft"],
        ),
        ({"router": "hash", "jitter": 0.1}, ["moe.jitter=0.1", "moe.score=uniform"]),
        ({"router_noise": "fixed"}, ["moe.router_noise=fixed", "softmax_topk"]),
        (
            {"router": "noisy_topk", "load_weight": 0.1, "noise_scale": 0.0},
            ["moe.load_weight=0.1", "noise_scale=0.0"],
        ),
        (
            {"router": "noisy_topk", "load_weight": 0.1, "selection_bias": True},
            ["moe.selection_bias=True"],
        ),
        (
            {"router": "noisy_topk", "vmoe_load_weight": 0.1, "num_groups": 4, "top_k_groups": 2},
            ["moe.vmoe_load_weight=0.1", "moe.num_groups=4"],
        ),
    ],
)
def test_a_leaf_that_a_router_would_ignore_or_contradict_is_refused(moe, parts):
    with pytest.raises(ConfigError) as caught:
        resolve({"moe": {"d_expert": 8} | moe})
    assert all(part in str(caught.value) for part in parts), str(caught.value)
