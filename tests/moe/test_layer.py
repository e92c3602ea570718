"""The MoE layer: outputs, statistics and every gradient against the oracle; and what it promises
beyond numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import oracle
from cases.moe import info_of
from moejax.config import MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.moe.balancing.losses import balance_loss, z_loss
from moejax.moe.balancing.metrics import routing_metrics
from moejax.moe.balancing.stats import add_stats
from moejax.moe.experts.experts import Experts, ExpertWeights, FeedForward, apply_experts
from moejax.moe.layer import MoE
from moejax.sharding import MESH_AXES

B, L, D, F, E = 2, 7, 5, 6, 4
BALANCE_WEIGHT, Z_WEIGHT = 0.3, 0.1

ALLOWED = [("softmax_topk", 1, False), ("switch", 1, False)] + [
    ("softmax_topk", top_k, renormalize) for top_k in (2, E) for renormalize in (False, True)
]


def config_of(**changes):
    """A tiny layer; capacity buffers have room for every token unless told otherwise."""
    base = MoeConfig(
        num_experts=E, top_k=2, d_expert=F, capacity_factor=float(E), num_shared_experts=2
    )
    return derive_moe(dataclasses.replace(base, **changes), L)


@functools.cache
def abstract_layer(config, dtype):
    return nnx.split(
        nnx.eval_shape(
            lambda: MoE(config, D, jnp.dtype(dtype), vocab_size=7, rngs=nnx.Rngs(params=0))
        )
    )


def layer_with(config, weights, dtype="float32"):
    """The layer with the oracle's weights in place of its initial ones."""
    graphdef, abstract = abstract_layer(config, dtype)
    state = jax.tree.map(lambda x: x, abstract)  # a copy, for it is filled in place
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, as_state(weights)))
    return nnx.merge(graphdef, state)


def fresh_weights(config, seed=0):
    """Weights large enough that routing is far from uniform."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    shared = config.num_shared_experts * config.d_expert
    return oracle.LayerWeights(
        router_DE=normal(D, config.num_experts),
        gate_up_ED2F=normal(config.num_experts, D, 2, F),
        down_EFD=normal(config.num_experts, F, D),
        shared_gate_up_D2F=normal(D, 2, shared) if shared else None,
        shared_down_FD=normal(shared, D) if shared else None,
    )


def as_state(weights):
    """The oracle's weights under the layer's names."""
    state = {
        "router": {"kernel": weights.router_DE},
        "experts": {"gate_up": weights.gate_up_ED2F, "down": weights.down_EFD},
    }
    if weights.shared_gate_up_D2F is not None:
        state["shared"] = {"gate_up": weights.shared_gate_up_D2F, "down": weights.shared_down_FD}
    return state


def apply(config, x_BLD, weights, mask_BL, factor):
    return layer_with(config, weights)(x_BLD, info_of(config, mask_BL, factor))


def objective_of(config, x_BLD, weights, mask_BL, factor, cotangent_BLD, aux):
    """<cotangent, output> + weighted auxiliary losses; with output and statistics as well."""
    y_BLD, stats = apply(config, x_BLD, weights, mask_BL, factor)
    stacked = jax.tree.map(lambda x: x[None], stats)
    losses = BALANCE_WEIGHT * balance_loss(stacked)[0] + Z_WEIGHT * z_loss(stacked)[0]
    return jnp.sum(cotangent_BLD * y_BLD) + aux * losses, (y_BLD, stacked)


@functools.cache
def value_and_gradients(config):
    """Compiled once for each config: `(x, weights, mask, factor, cotangent) -> (objective, (y,
    stats)), gradients`.
    """
    run = jax.jit(
        jax.value_and_grad(functools.partial(objective_of, config), argnums=(0, 1), has_aux=True)
    )
    return lambda *arguments, aux=1.0: run(*arguments, jnp.float32(aux))


def forward(config, x_BLD, weights, mask_BL, factor=None):
    """Output and statistics, by the same compiled program."""
    factor = None if factor is None else jnp.float32(factor)
    return value_and_gradients(config)(x_BLD, weights, mask_BL, factor, np.zeros_like(x_BLD))[0][1]


@functools.cache
def expected_gradients(renormalize):
    dense = functools.partial(oracle.dense_objective, renormalize=renormalize)
    return jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))


def draw(seed=0, masked=0.2):
    rng = np.random.default_rng(100 + seed)
    x_BLD, cotangent_BLD = (rng.normal(size=(B, L, D)).astype(np.float32) for _ in range(2))
    return x_BLD, rng.random((B, L)) >= masked, cotangent_BLD


def check(config, weights, x_BLD, mask_BL, cotangent_BLD, factor=None, limit=None):
    """Output, statistics, losses, metrics and every gradient against the oracle, whose result is
    returned.
    """
    expected = oracle.layer(
        x_BLD, mask_BL, weights, top_k=config.top_k, renormalize=config.renormalize, limit=limit
    )
    factor = None if factor is None else jnp.float32(factor)
    (objective, (y_BLD, stats)), gradients = value_and_gradients(config)(
        x_BLD, weights, mask_BL, factor, cotangent_BLD
    )
    oracle.assert_close(y_BLD, expected.y_BLD)
    assert stats.assignments_E[0].tolist() == oracle.counts(expected).tolist()
    if mask_BL.any():
        oracle.assert_close(balance_loss(stats), [oracle.balance_loss(expected)])
        oracle.assert_close(z_loss(stats), [oracle.z_loss(expected)])
        theirs = oracle.metrics(expected)
        for name, value in routing_metrics(stats).items():
            # Differences of numbers near 1 are exact to an ulp of 1, not to an ulp of themselves.
            np.testing.assert_allclose(value, [theirs[name]], rtol=1e-5, atol=1e-6, err_msg=name)
    masks = oracle.selection(expected)
    dense, dense_gradients = expected_gradients(config.renormalize)(
        x_BLD, weights, mask_BL, *masks, cotangent_BLD, BALANCE_WEIGHT, Z_WEIGHT
    )
    oracle.assert_close(objective, dense)
    # Two float32 programs that add up in different orders.
    oracle.assert_close(gradients, dense_gradients, rtol=2e-5)
    return expected, gradients


# Against the oracle
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "top_k", "renormalize"), ALLOWED)
def test_the_dropless_layer_and_all_its_gradients_equal_the_oracle(router, top_k, renormalize):
    config = config_of(router=router, top_k=top_k, renormalize=renormalize)
    for seed in range(3):
        check(config, fresh_weights(config, seed), *draw(seed))


@pytest.mark.parametrize(("router", "top_k", "renormalize"), ALLOWED)
@pytest.mark.parametrize("factor", [0.3, 0.6, 1.0, 2.0])
def test_the_capacity_layer_and_all_its_gradients_equal_the_oracle_also_when_it_drops(
    router, top_k, renormalize, factor
):
    config = config_of(router=router, top_k=top_k, renormalize=renormalize, dispatch="capacity")
    limit = oracle.capacity(factor, top_k, L, E)
    dropped = 0
    for seed in range(3):
        expected, _ = check(
            config, fresh_weights(config, seed), *draw(seed), factor=factor, limit=limit
        )
        dropped += np.sum((expected.experts_BLK >= 0) & ~expected.kept_BLK)
    assert dropped > 0 or factor == 2.0 or (top_k == E and factor == 1.0)


@pytest.mark.parametrize("implementation", ["ragged", "padded", "dense"])
def test_the_layer_equals_the_oracle_with_every_other_grouped_product(implementation):
    config = config_of(grouped_matmul=implementation)
    check(config, fresh_weights(config), *draw())


@pytest.mark.parametrize(
    "changes", [{"grouped_matmul": "padded"}, {"dispatch": "capacity"}], ids=str
)
def test_second_derivatives_are_those_of_the_dense_formulation(changes):
    config, (x_BLD, mask_BL, cotangent_BLD) = config_of(**changes), draw()
    factor = jnp.float32(E) if config.dispatch == "capacity" else None
    weights, direction_BLD = fresh_weights(config), draw(1)[0]
    masks = oracle.selection(oracle.layer(x_BLD, mask_BL, weights, top_k=2, renormalize=True))

    def ours(x_BLD, weights):
        return objective_of(config, x_BLD, weights, mask_BL, factor, cotangent_BLD, 1.0)[0]

    def theirs(x_BLD, weights):
        more = cotangent_BLD, BALANCE_WEIGHT, Z_WEIGHT, True
        return oracle.dense_objective(x_BLD, weights, mask_BL, *masks, *more)

    def second(objective):
        """Gradients of the slope along a direction of the tokens."""

        def slope(x_BLD, weights):
            return jnp.sum(jax.grad(objective)(x_BLD, weights) * direction_BLD)

        return jax.jit(jax.grad(slope, (0, 1)))(x_BLD, jax.tree.map(jnp.asarray, weights))

    oracle.assert_close(second(ours), second(theirs), rtol=5e-5)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_a_layer_without_shared_experts_equals_the_oracle(dispatch):
    config = config_of(num_shared_experts=0, dispatch=dispatch)
    assert not hasattr(layer_with(config, fresh_weights(config)), "shared")
    factor = 0.5 if dispatch == "capacity" else None
    limit = oracle.capacity(0.5, 2, L, E) if factor else None
    check(config, fresh_weights(config), *draw(), factor=factor, limit=limit)


def with_favourites(weights, x_BLD, experts):
    """Makes every token choose `experts`, in this order, by a constant feature of `x`."""
    x_BLD = x_BLD.copy()
    x_BLD[..., 0] = 1
    router_DE = np.zeros_like(weights.router_DE)
    router_DE[1:] = 0.01 * weights.router_DE[1:]
    for rank, e in enumerate(experts):
        router_DE[0, e] = 4 - rank
    return dataclasses.replace(weights, router_DE=router_DE), x_BLD


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("favourites", [(0, 1), (3, 0), (2, 3)])
def test_experts_without_tokens_get_exactly_zero_gradient_and_full_ones_the_right_one(
    dispatch, favourites
):
    config = config_of(dispatch=dispatch)
    x_BLD, mask_BL, cotangent_BLD = draw()
    weights, x_BLD = with_favourites(fresh_weights(config), x_BLD, favourites)
    factor = 1.0 if dispatch == "capacity" else None
    limit = oracle.capacity(1.0, 2, L, E) if factor else None
    expected, gradients = check(
        config, weights, x_BLD, mask_BL, cotangent_BLD, factor=factor, limit=limit
    )
    counts_E = oracle.counts(expected)
    assert set(np.flatnonzero(counts_E)) == set(favourites) and counts_E.max() == mask_BL.sum()
    idle_E = counts_E == 0
    assert not np.any(gradients[1].gate_up_ED2F[idle_E]) and not np.any(
        gradients[1].down_EFD[idle_E]
    )


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_all_tokens_to_one_expert_equals_the_oracle(dispatch):
    config = config_of(top_k=1, renormalize=False, dispatch=dispatch)
    x_BLD, _, cotangent_BLD = draw()
    weights, x_BLD = with_favourites(fresh_weights(config), x_BLD, (2,))
    factor = 0.6 if dispatch == "capacity" else None
    limit = oracle.capacity(0.6, 1, L, E) if factor else None
    full = np.ones((B, L), bool)
    expected, _ = check(config, weights, x_BLD, full, cotangent_BLD, factor=factor, limit=limit)
    if factor:
        assert oracle.metrics(expected)["unserved"] == pytest.approx(1 - limit / L)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_a_batch_of_padding_only_gives_zeros_and_finite_gradients(dispatch):
    config = config_of(dispatch=dispatch)
    x_BLD, _, cotangent_BLD = draw()
    no_token = np.zeros((B, L), bool)
    factor = jnp.float32(1) if dispatch == "capacity" else None
    (_, (y_BLD, stats)), gradients = value_and_gradients(config)(
        x_BLD, fresh_weights(config), no_token, factor, cotangent_BLD
    )
    assert not np.any(y_BLD) and not np.any(stats.assignments_E) and stats.num_tokens == 0
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 50),
    mask=st.lists(st.booleans(), min_size=B * L, max_size=B * L).filter(any),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    factor=st.sampled_from([None, 0.3, 1.0, 4.0]),
)
def test_any_mask_router_scale_and_capacity_equal_the_oracle(seed, mask, scale, factor):
    config = config_of(dispatch="dropless" if factor is None else "capacity")
    weights = fresh_weights(config, seed)
    weights = dataclasses.replace(weights, router_DE=np.float32(scale) * weights.router_DE)
    x_BLD, _, cotangent_BLD = draw(seed)
    limit = None if factor is None else oracle.capacity(factor, 2, L, E)
    mask_BL = np.array(mask).reshape(B, L)
    expected = oracle.layer(x_BLD, mask_BL, weights, top_k=2, renormalize=True, limit=limit)
    traced = None if factor is None else jnp.float32(factor)
    _, (y_BLD, stats) = value_and_gradients(config)(x_BLD, weights, mask_BL, traced, cotangent_BLD)[
        0
    ]
    oracle.assert_close(y_BLD, expected.y_BLD)
    real = expected.experts_BLK >= 0
    assert float(stats.dropped[0]) == np.sum(real & ~expected.kept_BLK)
    assert float(stats.unserved[0]) == np.sum(mask_BL & ~expected.kept_BLK.any(-1))


# Capacity and dropless
# --------------------------------------------------------------------------------------------


def test_dropless_equals_capacity_when_no_expert_can_overflow():
    weights, (x_BLD, mask_BL, cotangent_BLD) = fresh_weights(config_of()), draw()
    dropless = value_and_gradients(config_of())(x_BLD, weights, mask_BL, None, cotangent_BLD)
    capacity = value_and_gradients(config_of(dispatch="capacity"))(
        x_BLD, weights, mask_BL, jnp.float32(E), cotangent_BLD
    )
    oracle.assert_close(dropless, capacity)


def test_capacity_dispatch_without_a_factor_is_dropless():
    weights, (x_BLD, mask_BL, cotangent_BLD) = fresh_weights(config_of()), draw()
    config = config_of(dispatch="capacity", capacity_factor=0.1)
    evaluated = value_and_gradients(config)(x_BLD, weights, mask_BL, None, cotangent_BLD)
    oracle.assert_close(
        evaluated, value_and_gradients(config_of())(x_BLD, weights, mask_BL, None, cotangent_BLD)
    )


def test_a_traced_capacity_limits_below_the_static_one_and_cannot_exceed_it():
    weights, (x_BLD, mask_BL, cotangent_BLD) = fresh_weights(config_of()), draw(masked=0)
    tight = config_of(dispatch="capacity", capacity_factor=0.6)
    ample = config_of(dispatch="capacity")
    tight_run = value_and_gradients(tight)(x_BLD, weights, mask_BL, jnp.float32(0.6), cotangent_BLD)
    oracle.assert_close(
        value_and_gradients(ample)(x_BLD, weights, mask_BL, jnp.float32(0.6), cotangent_BLD),
        tight_run,
    )
    oracle.assert_close(
        value_and_gradients(tight)(x_BLD, weights, mask_BL, jnp.float32(3.0), cotangent_BLD),
        tight_run,
    )
    assert tight_run[0][1][1].dropped > 0


# Invariances
# --------------------------------------------------------------------------------------------------


both_dispatches = pytest.mark.parametrize(
    ("dispatch", "factor"), [("dropless", None), ("capacity", 0.6)]
)


@both_dispatches
def test_what_stands_at_padding_changes_no_output_and_no_statistic(dispatch, factor):
    config = config_of(dispatch=dispatch)
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    garbage_BLD = 1e3 * np.random.default_rng(5).normal(size=x_BLD.shape).astype(np.float32)
    other_BLD = np.where(mask_BL[..., None], x_BLD, garbage_BLD)
    one = forward(config, x_BLD, weights, mask_BL, factor)
    assert not mask_BL.all() and not np.any(one[0][~mask_BL])
    jax.tree.map(
        np.testing.assert_array_equal, one, forward(config, other_BLD, weights, mask_BL, factor)
    )


def test_padding_appended_to_every_sequence_changes_nothing():
    config, short = config_of(), L - 3
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    expected = oracle.layer(
        x_BLD[:, :short], mask_BL[:, :short], weights, top_k=2, renormalize=True
    )
    padded_mask_BL = np.where(np.arange(L) < short, mask_BL, False)
    y_BLD, stats = forward(config, x_BLD, weights, padded_mask_BL)
    oracle.assert_close(y_BLD[:, :short], expected.y_BLD)
    assert not np.any(y_BLD[:, short:])
    oracle.assert_close(balance_loss(stats), [oracle.balance_loss(expected)])
    oracle.assert_close(z_loss(stats), [oracle.z_loss(expected)])
    assert stats.num_tokens == mask_BL[:, :short].sum()


def test_permuting_the_tokens_permutes_the_outputs_and_leaves_the_statistics():
    config = config_of()
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    order = np.random.default_rng(3).permutation(B * L)

    def permute(a):
        return a.reshape(B * L, *a.shape[2:])[order].reshape(a.shape)

    y_BLD, stats = forward(config, x_BLD, weights, mask_BL)
    permuted_BLD, permuted_stats = forward(config, permute(x_BLD), weights, permute(mask_BL))
    oracle.assert_close(permuted_BLD, permute(np.asarray(y_BLD)))
    oracle.assert_close(permuted_stats, stats)


@both_dispatches
def test_statistics_of_two_parts_of_a_batch_add_up_to_those_of_the_whole(dispatch, factor):
    config = config_of(dispatch=dispatch)
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    first_B1 = np.array([[True], [False]])
    parts = [
        forward(config, x_BLD, weights, mask_BL & part, factor) for part in (first_B1, ~first_B1)
    ]
    y_BLD, stats = forward(config, x_BLD, weights, mask_BL, factor)
    oracle.assert_close(add_stats(parts[0][1], parts[1][1]), stats)
    oracle.assert_close(oracle.add(parts[0][0], parts[1][0]), y_BLD)


@both_dispatches
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(dispatch, factor):
    config = config_of(dispatch=dispatch)
    weights, (x_BLD, _, _), (others_BLD, _, _) = fresh_weights(config), draw(0), draw(1)
    full = np.ones((B, L), bool)
    beside_others = forward(config, np.stack([x_BLD[0], others_BLD[1]]), weights, full, factor)[0]
    oracle.assert_close(beside_others[0], forward(config, x_BLD, weights, full, factor)[0][0])


@both_dispatches
def test_a_token_does_not_depend_on_later_ones(dispatch, factor):
    config = config_of(dispatch=dispatch)
    weights, (x_BLD, _, _), (others_BLD, _, _) = fresh_weights(config), draw(0), draw(1)
    full, cut = np.ones((B, L), bool), L // 2
    changed_BLD = np.concatenate([x_BLD[:, :cut], others_BLD[:, cut:]], axis=1)
    y_BLD, changed_y_BLD = (
        forward(config, x, weights, full, factor)[0] for x in (x_BLD, changed_BLD)
    )
    oracle.assert_close(changed_y_BLD[:, :cut], y_BLD[:, :cut])
    assert np.all(np.any(changed_y_BLD[:, cut:] != y_BLD[:, cut:], axis=-1))


def test_on_a_mesh_outputs_counts_and_gradients_are_those_of_the_oracle():
    config = config_of(dispatch="capacity")  # dropless on a mesh: tests/training/test_invariance.py
    x_BLD, mask_BL, cotangent_BLD = (
        np.concatenate([a, b]) for a, b in zip(draw(0), draw(1), strict=True)
    )
    weights, limit = fresh_weights(config), oracle.capacity(0.6, 2, L, E)
    mesh = jax.make_mesh((2, 1, 1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    with jax.set_mesh(mesh):
        run = jax.jit(
            jax.value_and_grad(
                functools.partial(objective_of, config), argnums=(0, 1), has_aux=True
            )
        )
        arguments = (x_BLD, weights, mask_BL, jnp.float32(0.6), cotangent_BLD, jnp.float32(1))
        (_, (y_BLD, stats)), gradients = run(*arguments)
    expected = oracle.layer(x_BLD, mask_BL, weights, top_k=2, renormalize=True, limit=limit)
    oracle.assert_close(y_BLD, expected.y_BLD)
    real = expected.experts_BLK >= 0
    assert float(stats.dropped[0]) == np.sum(real & ~expected.kept_BLK) > 0
    _, expected_of_all = expected_gradients(True)(
        x_BLD,
        weights,
        mask_BL,
        *oracle.selection(expected),
        cotangent_BLD,
        BALANCE_WEIGHT,
        Z_WEIGHT,
    )
    oracle.assert_close(jax.device_get(gradients), expected_of_all, rtol=2e-5)


# What the router learns from
# --------------------------------------------------------------------------------------


@both_dispatches
@pytest.mark.parametrize(("router", "top_k", "renormalize"), ALLOWED)
def test_the_task_alone_gives_every_allowed_router_a_gradient(
    router, top_k, renormalize, dispatch, factor
):
    config = config_of(router=router, top_k=top_k, renormalize=renormalize, dispatch=dispatch)
    x_BLD, mask_BL, cotangent_BLD = draw()
    traced = None if factor is None else jnp.float32(factor)
    arguments = (x_BLD, fresh_weights(config), mask_BL, traced, cotangent_BLD)
    _, gradients = value_and_gradients(config)(*arguments, aux=0.0)
    assert np.abs(gradients[1].router_DE).max() > 1e-2


# Shapes, dtypes, initial values
# -----------------------------------------------------------------------------------


def traced(config, batch, length, width=8, gradient=False):
    """The jaxpr of a layer, or of its gradient, on abstract arrays."""
    layer = nnx.eval_shape(
        lambda: MoE(config, width, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=0))
    )
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    x_BLD = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    mask_BL = jax.ShapeDtypeStruct((batch, length), jnp.bool)

    def run(params, x_BLD, mask_BL, rest):
        y_BLD, stats = nnx.merge(graphdef, params, rest)(x_BLD, info_of(config, mask_BL))
        return jnp.sum(y_BLD**2) + jnp.sum(stats.probs_E) + stats.z

    return jax.make_jaxpr(jax.grad(run, argnums=(0, 1)) if gradient else run)(
        params, x_BLD, mask_BL, rest
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_no_intermediate_of_the_dropless_layer_has_an_entry_per_token_and_expert_and_choice(
    gradient,
):
    batch, length, num_experts, top_k, width = 2, 256, 32, 2, 8
    tokens = batch * length

    def largest(implementation):
        config = config_of(num_experts=num_experts, top_k=top_k, grouped_matmul=implementation)
        jaxpr = traced(config, batch, length, width, gradient)
        return max(v.aval.size for equation in oracle.equations(jaxpr) for v in equation.outvars)

    limit = tokens * num_experts * min(top_k, width)
    assert largest("tiled") < limit
    assert largest("ragged") < limit
    assert largest("dense") > limit  # and one would be seen


@functools.cache
def initial(module, *sizes):
    """The initial arrays of a module, by name."""
    make = jax.jit(
        lambda: nnx.to_pure_dict(
            nnx.state(module(*sizes, jnp.dtype("float32"), rngs=nnx.Rngs(params=0)))
        )
    )
    return jax.tree.map(np.asarray, make())


@pytest.mark.parametrize("num_experts", [2, 16])
def test_every_expert_starts_with_the_deviation_of_a_dense_layer(num_experts):
    width, hidden = 64, 96
    dense = initial(FeedForward, width, hidden)
    experts = initial(Experts, num_experts, width, hidden)
    for name, fan_in in (("gate_up", width), ("down", hidden)):
        stacked, one = experts[name], dense[name]
        assert stacked.shape == (num_experts, *one.shape)
        # 6,144 draws or more: their deviation is known to 1 %.
        np.testing.assert_allclose(one.std(), fan_in**-0.5, rtol=0.04)
        np.testing.assert_allclose(
            stacked.reshape(num_experts, -1).std(axis=1), fan_in**-0.5, rtol=0.04
        )
        assert len(np.unique(stacked.reshape(num_experts, -1)[:, 0])) == num_experts  # no two alike


def test_the_weights_of_an_expert_do_not_depend_on_how_many_others_there_are():
    few, many = (initial(Experts, num_experts, 64, 96) for num_experts in (2, 16))
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(few[name], many[name][:2])


def test_router_logits_probabilities_and_weights_stay_float32_under_bfloat16():
    config = config_of()
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    x_BLD = jnp.asarray(x_BLD, jnp.bfloat16)
    layer = layer_with(config, weights, "bfloat16")
    y_BLD, stats = jax.jit(lambda x_BLD: layer(x_BLD, info_of(config, mask_BL, trace=True)))(x_BLD)
    assert y_BLD.dtype == jnp.bfloat16
    routing = stats.routing
    assert (
        routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weights_TK.dtype == jnp.float32
    )
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(stats))
    logits_BLE = (
        np.asarray(x_BLD, np.float64) @ weights.router_DE
    )  # of the rounded inputs, not rounded again
    logits_BLE[~mask_BL] = 0
    oracle.assert_close(routing.logits_TE, logits_BLE.reshape(B * L, E))
    assert all(
        v.dtype == jnp.float32
        for v in jax.tree.leaves(abstract_layer(config, "bfloat16")[1].filter(nnx.Param))
    )
    expected = oracle.layer(x_BLD, mask_BL, weights, top_k=2, renormalize=True)
    # Two products and a sum in bfloat16, whose unit is 2^-8.
    oracle.assert_close(y_BLD, expected.y_BLD, rtol=0.03)


def test_a_trace_keeps_the_routing_of_every_token_and_nothing_is_kept_without_it():
    config = config_of()
    weights, (x_BLD, mask_BL, _) = fresh_weights(config), draw()
    assert forward(config, x_BLD, weights, mask_BL)[1].routing is None
    layer = layer_with(config, weights)
    routing = jax.jit(lambda x_BLD: layer(x_BLD, info_of(config, mask_BL, trace=True)))(x_BLD)[
        1
    ].routing
    expected = oracle.layer(x_BLD, mask_BL, weights, top_k=2, renormalize=True)
    experts_TK = np.where(expected.experts_BLK < 0, E, expected.experts_BLK).reshape(B * L, 2)
    np.testing.assert_array_equal(routing.experts_TK, experts_TK)
    oracle.assert_close(routing.weights_TK, expected.weights_BLK.reshape(B * L, 2))


def test_a_dense_feed_forward_network_is_the_oracles_swiglu():
    network = FeedForward(D, F, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    x_BLD = draw()[0]
    gate_up_D2F, down_FD = (np.asarray(w[...], np.float64) for w in (network.gate_up, network.down))
    expected = [
        [oracle.swiglu(x.astype(np.float64), gate_up_D2F, down_FD) for x in row] for row in x_BLD
    ]
    oracle.assert_close(jax.jit(network)(x_BLD), expected)


def test_shared_experts_are_the_sum_of_as_many_networks_of_an_experts_width():
    config = config_of()
    weights, (x_BLD, _, _) = fresh_weights(config), draw()
    gate_up_D2F, down_FD = weights.shared_gate_up_D2F, weights.shared_down_FD
    assert gate_up_D2F.shape == (D, 2, 2 * F)
    full = np.ones((B, L), bool)
    without = dataclasses.replace(weights, shared_gate_up_D2F=0 * gate_up_D2F)
    shared_BLD = forward(config, x_BLD, weights, full)[0] - forward(config, x_BLD, without, full)[0]
    expected = sum(
        np.array(
            [
                [oracle.swiglu(x, gate_up_D2F[:, :, part], down_FD[part]) for x in row]
                for row in x_BLD
            ]
        )
        for part in (slice(0, F), slice(F, 2 * F))
    )
    oracle.assert_close(shared_BLD, expected, rtol=3e-5)  # a difference of two outputs


def test_experts_are_applied_by_the_product_they_are_given():
    x_RD = jnp.ones((3, 2))
    calls = []

    def matmul(x_RP, w_EPQ):
        calls.append(w_EPQ.shape)
        return x_RP @ w_EPQ[0]

    weights = ExpertWeights(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 4, 2)))
    y_RD = apply_experts(x_RD, weights, matmul, jnp.zeros(3, jnp.int32))
    assert calls == [(1, 2, 8), (1, 4, 2)]
    oracle.assert_close(y_RD, np.full((3, 2), 4 * 2 * 2 / (1 + np.exp(-2))))
