"""NumPy arrays are taken at every public door of routing, dispatch and balancing, under `jax.grad`
too.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.kernels import fused_feed_forward as feed_forward_module
from moejax.kernels import grouped_matmul as grouped_matmul_module
from moejax.kernels.fused_feed_forward import Rows, feed_forward
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.moe import router as routers
from moejax.moe.balancing import load, losses, metrics, state, sums
from moejax.moe.balancing.stats import collect
from moejax.moe.dispatch import capacity
from moejax.moe.dispatch import plan as dispatch
from moejax.moe.dispatch.capacity import CombineWeights
from moejax.moe.router import RouterInputs, route, route_expert_choice, route_soft

T, E, K, D, F, L = 8, 4, 2, 3, 5, 4
RNG = np.random.default_rng(0)
CONFIG = derive_moe(MoeConfig(num_experts=E, top_k=K, d_expert=F, router="noisy_topk"), L)
MASK_T = np.arange(T) != 3
EXPERTS_TK = np.where(
    MASK_T[:, None], np.argsort(RNG.normal(size=(T, E)), axis=1)[:, :K], E
).astype(np.int32)
PLAN = jax.tree.map(np.asarray, dispatch.plan_dropless(jnp.asarray(EXPERTS_TK), E))
SPARE_PLAN = jax.tree.map(
    np.asarray, dispatch.plan_dropless(jnp.asarray(EXPERTS_TK), E, padding_rows=4)
)
GATE_UP_EDPF, DOWN_EFD = RNG.random((E, D, 1, F), np.float32), RNG.random((E, F, D), np.float32)
WEIGHTS_TK = RNG.random((T, K), np.float32)
Y_RD = RNG.random((T * K, D), np.float32)
POSITIONS_BEC = RNG.integers(0, L + 1, (2, E, 2)).astype(np.int32)
SIZES_E = np.array([3, 0, 4, 2], np.int32)


def inputs(logits_TE, config=CONFIG):
    return RouterInputs(
        logits_TE,
        MASK_T,
        L,
        tokens_T=np.arange(T, dtype=np.int32) % 5,
        positions_T=np.arange(T, dtype=np.int32) % L,
        bias_E=np.zeros(E, np.float32),
        table_VK=np.argsort(RNG.normal(size=(5, E)), axis=1)[:, :K].astype(np.int32),
        noise_scale_TE=np.ones((T, E), np.float32),
        group_logits_TG=np.broadcast_to(np.arange(2, dtype=np.float32), (T, 2)),
        group_noise_scale_TG=np.ones((T, 2), np.float32),
        is_blocked_E=np.arange(E) == 1,
    )


LOGITS_TE = RNG.random((T, E), np.float32)
ROUTING = jax.tree.map(np.asarray, route(inputs(LOGITS_TE), CONFIG))
NONE_TK = np.zeros((T, K), bool)
STATS = jax.tree.map(
    lambda a: np.asarray(a)[None],
    collect(
        jax.tree.map(jnp.asarray, ROUTING),
        jnp.asarray(MASK_T),
        CombineWeights(
            jnp.asarray(EXPERTS_TK),
            jnp.asarray(WEIGHTS_TK),
            jnp.asarray(NONE_TK),
            jnp.asarray(NONE_TK),
        ),
        CONFIG,
        length=L,
    ),
)


def in_stats(name):
    """The statistics with one array given."""
    return lambda value: type(STATS)(**{**vars(STATS), name: value})


def of_stats(function, *others):
    return lambda probs: function(in_stats("probs_E")(probs), *others)


def expert_choice(logits_TE):
    return route_expert_choice(inputs(logits_TE), CONFIG, 2).weights_BEC


# By name: a function of one array, which is differentiated; all others are of NumPy and
# belong to it.
DOORS = {
    "plan_dropless": (lambda x: x * dispatch.plan_dropless(EXPERTS_TK, E).row_TK, WEIGHTS_TK),
    "plan_capacity": (
        lambda x: x * dispatch.plan_capacity(EXPERTS_TK[None], E, 3).row_TK,
        WEIGHTS_TK,
    ),
    "dispatch": (lambda x_TD: dispatch.dispatch(x_TD, PLAN), RNG.random((T, D), np.float32)),
    "add_up": (lambda y_RD: dispatch.add_up(y_RD, PLAN), Y_RD),
    "dispatch_weights": (lambda w_TK: dispatch.dispatch_weights(w_TK, PLAN), WEIGHTS_TK),
    "combine": (lambda y_RD: dispatch.combine(y_RD, WEIGHTS_TK, PLAN), Y_RD),
    "combine weights": (lambda w_TK: dispatch.combine(Y_RD, w_TK, PLAN), WEIGHTS_TK),
    "take_slots": (
        lambda x_BLD: dispatch.take_slots(x_BLD, POSITIONS_BEC),
        RNG.random((2, L, D), np.float32),
    ),
    "add_slots": (
        lambda y: dispatch.add_slots(y, POSITIONS_BEC, L),
        RNG.random((2, E, 2, D), np.float32),
    ),
    "apply_capacity": (
        lambda w_TK: (
            w_TK
            * capacity.apply_capacity(
                EXPERTS_TK,
                LOGITS_TE,
                w_TK,
                2,
                num_experts=E,
                num_groups=2,
                order="weight",
                overflow="next",
            ).is_dropped_TK
        ),
        WEIGHTS_TK,
    ),
    "combine_within_capacity": (
        lambda x: (
            x
            * capacity.combine_within_capacity(
                ROUTING, CONFIG, 1.0, length=L, num_devices=1
            ).weights_TK
        ),
        WEIGHTS_TK,
    ),
    "capacity_limit": (lambda x: x * capacity.capacity_limit(np.float32(1.1), K, T, E), WEIGHTS_TK),
    "grouped_matmul": (
        lambda w_EDF: grouped_matmul(Y_RD, w_EDF, SIZES_E),
        RNG.random((E, D, F), np.float32),
    ),
    "feed_forward": (
        lambda x_TD: feed_forward(
            x_TD,
            WEIGHTS_TK,
            GATE_UP_EDPF,
            DOWN_EFD,
            Rows(SPARE_PLAN.row_TK, SPARE_PLAN.choice_R, SPARE_PLAN.group_sizes_E),
            activate=lambda hidden: hidden[0],
            sizes=(4,),
        ),
        RNG.random((T, D), np.float32),
    ),
    "route_expert_choice": (expert_choice, LOGITS_TE),
    "route_soft": (
        lambda x_BLS: route_soft(x_BLS, MASK_T.reshape(2, L)).combine_BLS ** 2,
        RNG.random((2, L, 8), np.float32),
    ),
    "auxiliary_losses": (
        of_stats(lambda stats: losses.auxiliary_losses(stats, CONFIG)["balance"].term_N),
        STATS.probs_E,
    ),
    "balance_loss": (of_stats(losses.balance_loss), STATS.probs_E),
    "in_convention": (
        lambda b_N: losses.in_convention(b_N, STATS, "times_k"),
        np.ones(1, np.float32),
    ),
    "cv_squared": (load.cv_squared, STATS.probs_E),
    "z_loss": (lambda z: losses.z_loss(in_stats("z")(z)), STATS.z),
    "fractions": (lambda x: x * load.fractions(STATS.assignments_E), STATS.probs_E),
    "load_fractions": (lambda x: x * load.load_fractions(STATS), STATS.probs_E),
    "routing_metrics": (
        of_stats(lambda stats: sum(metrics.routing_metrics(stats).values())),
        STATS.probs_E,
    ),
    "update_bias": (
        lambda b_NE: state.update_bias(
            b_NE, STATS.assignments_E, np.float32(0.1), is_centered=True
        ),
        STATS.probs_E,
    ),
    "update_quantiles": (
        lambda x: x * state.update_quantiles(LOGITS_TE[None], STATS.num_tokens, K),
        STATS.probs_E,
    ),
    "update_idle_steps": (
        lambda x: x * state.update_idle_steps(STATS.assignments_E, STATS.assignments_E),
        STATS.probs_E,
    ),
    "count_assignments": (lambda x: x * sums.count_assignments(EXPERTS_TK, E)[None], STATS.probs_E),
    "sum_by_expert": (lambda w_TK: sums.sum_by_expert(EXPERTS_TK, w_TK, E), WEIGHTS_TK),
    "balance_of_scopes": (
        lambda p_TE: sums.balance_of_scopes(EXPERTS_TK, p_TE, MASK_T, 2),
        LOGITS_TE,
    ),
    "unbiased_choices": (
        lambda w_TK: w_TK * sums.unbiased_choices(ROUTING, MASK_T, CONFIG),
        WEIGHTS_TK,
    ),
    "sum_of_margins": (lambda p_TE: p_TE * sums.sum_of_margins(p_TE, MASK_T, K), LOGITS_TE),
    "count_ties": (lambda x: x * sums.count_ties(ROUTING, MASK_T), LOGITS_TE),
    "expected_load": (lambda x: x * sums.expected_load(ROUTING, MASK_T, K)[None], STATS.probs_E),
    "expected_load_vmoe": (
        lambda x: x * sums.expected_load_vmoe(ROUTING, MASK_T, K)[None],
        STATS.probs_E,
    ),
    "quantile_margins": (
        lambda x: jnp.nan_to_num(sums.quantile_margins(ROUTING, MASK_T, K)) * x,
        LOGITS_TE,
    ),
}
TOKEN_CHOICE = {
    name: {"num_groups": 2, "top_k_groups": 1} if name == "hierarchical" else {}
    for name in routers.ROUTERS
}


def has_arrays(function):
    """Whether a function takes arrays, or records of them."""
    hints = [
        str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()
    ]
    return any(
        word in hint
        for hint in hints
        for word in ("Array", "Plan", "Routing", "RouterInputs", "Float", "Int")
    )


def test_every_public_door_is_tried():
    modules = (
        losses,
        load,
        metrics,
        state,
        capacity,
        dispatch,
        sums,
        routers,
        feed_forward_module,
        grouped_matmul_module,
    )
    doors = set()
    for module in modules:
        functions = inspect.getmembers(module, inspect.isfunction)
        own = (
            n
            for n, f in functions
            if f.__module__.startswith(module.__name__) and not n.startswith("_")
        )
        doors |= {name for name in own if has_arrays(getattr(module, name))}
    inner = {
        "add_rows",
        "token_counts",
        "route",
        "combine_weights",
        "log_weights",
        "save_for_remat",
    } | {
        *(name for name in dir(grouped_matmul_module) if name.startswith("grouped_matmul_")),
        # These take `RouterInputs`, which makes arrays of jax of all that it gets; see below.
        *(function.__name__ for function in routers.ROUTERS.values()),
    }
    assert doors - inner <= DOORS.keys()


@pytest.mark.parametrize("door", DOORS)
def test_a_gradient_flows_past_arrays_of_numpy(door):
    function, argument = DOORS[door]
    gradient = jax.grad(lambda x: jnp.sum(function(x)))(argument)
    given = jax.tree.map(jnp.asarray, argument)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: jnp.sum(function(x)))(given))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("router", TOKEN_CHOICE)
def test_every_router_takes_arrays_of_numpy_under_a_gradient(router):
    leaves = {
        "router": router,
        "top_k": 1 if router == "switch" else K,
        "renormalize": router != "switch",
    }
    leaves |= {"top_k": E} if router == "dense" else {}
    config = derive_moe(MoeConfig(num_experts=E, d_expert=F, **leaves, **TOKEN_CHOICE[router]), L)
    gradient_TE = jax.grad(
        lambda logits_TE: jnp.sum(route(inputs(logits_TE), config, None).weights_TK ** 2)
    )(LOGITS_TE)
    assert np.isfinite(gradient_TE).all()
    assert np.any(gradient_TE) or config.score == "uniform"
