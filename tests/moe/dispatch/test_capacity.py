"""Capacity: who finds a slot, who moves on, and with which weights, against loops over choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from cases.moe import info_of
from moejax.config import ConfigError, MoeConfig, resolve
from moejax.moe.dispatch.capacity import apply_capacity, capacity_limit, capacity_slots
from moejax.moe.layer import MoE
from oracle import overflow as oracle_overflow
from oracle import routers as oracle_routers

T, K, E, FREE = 12, 2, 4, 1
CHOICES = E + FREE  # and CHOICES is the id of no expert

orders = pytest.mark.parametrize("order", ["position", "choice", "weight"])
overflows = pytest.mark.parametrize("overflow", ["drop", "next", "renormalize"])


@functools.cache
def assignments(order, overflow, num_groups):
    """The jitted `(experts_TK, ranking_TE, weights_TK, limit) -> CapacityAssignment`."""
    how = {"num_experts": E, "num_groups": num_groups, "order": order, "overflow": overflow}
    return jax.jit(functools.partial(apply_capacity, **how)), functools.partial(
        oracle_overflow.apply_capacity, **how
    )


def draw(seed, masked=0.2, skew=2.0):
    """Experts by rank of random values, weights that fall, and some masked tokens."""
    rng = np.random.default_rng(seed)
    ranking_TE = (rng.integers(-3, 4, (T, CHOICES)) + skew * (np.arange(CHOICES) == 1)).astype(
        np.float32
    )
    ranking_TE[rng.random((T, CHOICES)) < 0.2] = -np.inf
    ranking_TE[:, :K] = np.maximum(ranking_TE[:, :K], -5)  # enough that may be chosen
    experts_TK = np.argsort(-ranking_TE, axis=1, kind="stable")[:, :K].astype(np.int32)
    weights_TK = -np.sort(-rng.integers(1, 9, (T, K)).astype(np.float32))
    masked_T = rng.random(T) < masked
    experts_TK[masked_T], weights_TK[masked_T] = CHOICES, 0
    return experts_TK, ranking_TE, weights_TK


@orders
@overflows
@pytest.mark.parametrize("num_groups", [1, 3])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_who_keeps_moves_and_drops_is_what_a_loop_over_choices_says(
    order, overflow, num_groups, seed, limit
):
    experts_TK, ranking_TE, weights_TK = draw(seed)
    ours, theirs = assignments(order, overflow, num_groups)
    result = ours(experts_TK, ranking_TE, weights_TK, jnp.int32(limit))
    expected = theirs(experts_TK, ranking_TE, weights_TK, limit)
    final_TK = np.array([[CHOICES if e is None else e for e in row] for row in expected])
    np.testing.assert_array_equal(result.experts_TK, final_TK)
    np.testing.assert_array_equal(
        result.is_dropped_TK, [[e is None for e in row] for row in expected]
    )
    np.testing.assert_array_equal(
        result.is_moved_TK, (final_TK != experts_TK) & (final_TK != CHOICES)
    )


@orders
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_next_fills_slots_without_exceeding_them_and_never_sends_a_token_twice_to_an_expert(
    order, seed, limit
):
    arguments = (*draw(seed), jnp.int32(limit))
    moved, dropped = (
        np.asarray(assignments(order, what, 1)[0](*arguments).experts_TK)
        for what in ("next", "drop")
    )
    counts_E, counts_dropping_E = (
        np.bincount(x.ravel(), minlength=CHOICES + 1)[:E] for x in (moved, dropped)
    )
    assert counts_E.max() <= limit
    assert np.all(counts_E >= counts_dropping_E)
    for row in moved:
        real = [e for e in row if e < CHOICES]
        assert len(set(real)) == len(real)


@overflows
def test_by_position_the_fate_of_a_token_depends_on_earlier_ones_only(overflow):
    ours = assignments("position", overflow, 1)[0]
    changed = 0
    for seed in range(20):
        first, second = draw(seed), draw(seed + 1000)
        cut = T // 2
        mixed = [np.concatenate([a[:cut], b[cut:]]) for a, b in zip(first, second, strict=True)]
        one, other = (ours(*arrays, jnp.int32(2)).experts_TK for arrays in (first, mixed))
        np.testing.assert_array_equal(one[:cut], other[:cut])
        changed += np.any(one[cut:] != other[cut:])
    assert changed


@pytest.mark.parametrize("order", ["choice", "weight"])
def test_by_choice_and_by_weight_later_tokens_do_take_the_room_of_earlier_ones(order):
    # Slots for one. Token 0 has expert 1 as its second choice, token 1 as its first, with a
    # larger weight.
    experts_TK = jnp.array([[0, 1], [1, 2]], jnp.int32)
    weights_TK = jnp.array([[0.6, 0.4], [0.9, 0.1]])
    how = {"num_experts": 3, "num_groups": 1, "overflow": "drop"}
    result = apply_capacity(experts_TK, None, weights_TK, 1, order=order, **how)
    assert result.experts_TK.tolist() == [[0, 3], [1, 2]]
    assert apply_capacity(
        experts_TK, None, weights_TK, 1, order="position", **how
    ).experts_TK.tolist() == [
        [0, 1],
        [3, 2],
    ]


def test_by_weight_the_most_certain_tokens_are_served_first():
    experts_TK, weights_TK = jnp.zeros((4, 1), jnp.int32), jnp.array([[0.3], [0.9], [0.5], [0.9]])
    result = apply_capacity(
        experts_TK,
        None,
        weights_TK,
        2,
        num_experts=1,
        num_groups=1,
        order="weight",
        overflow="drop",
    )
    assert result.is_dropped_TK.ravel().tolist() == [True, False, True, False]


def test_a_group_has_slots_of_its_own():
    experts_TK, weights_TK = jnp.zeros((6, 1), jnp.int32), jnp.ones((6, 1))
    how = {"num_experts": 2, "order": "position", "overflow": "drop"}
    dropped = [
        apply_capacity(experts_TK, None, weights_TK, 1, num_groups=n, **how)
        .is_dropped_TK.ravel()
        .tolist()
        for n in (1, 2, 3)
    ]
    assert dropped == [[False] + [True] * 5, [False, True, True] * 2, [False, True] * 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 5}, "num_groups=5 must divide the 4 tokens"),
        ({"overflow": "next"}, "needs ranking_TE"),
    ],
)
def test_groups_that_do_not_divide_and_a_missing_ranking_are_errors(changes, message):
    how = {"num_experts": 2, "num_groups": 1, "order": "position", "overflow": "drop"} | changes
    with pytest.raises(ValueError, match=message):
        apply_capacity(jnp.zeros((4, 1), jnp.int32), None, jnp.ones((4, 1)), 1, **how)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.7, 1.0, 1.1, 1.2, 1.25, 1.3, 1.5, 2.0, 2.2])
def test_slots_are_the_ceiling_of_the_share_times_the_factor_within_bounds(
    factor,
):
    for top_k, num_experts in [(1, 8), (2, 8), (2, 64), (8, 64), (3, 7), (8, 8)]:
        for length in [1, 2, 40, 80, 200, 256, 2048]:
            exact = oracle.capacity(factor, top_k, length, num_experts)
            arguments = (top_k, length, num_experts)
            slots = capacity_slots(factor, *arguments)
            limit = int(capacity_limit(jnp.float32(factor), *arguments))
            assert limit == exact, (factor, *arguments)
            # Rounding 1.1 up to the next double may cost one idle slot, never one too few.
            assert exact <= slots <= exact + 1, (factor, *arguments)


# In a layer
# --------------------------------------------------------------------------------------------------

B, L, D = 2, 16, 5


@functools.cache
def layer_run(config, is_training):
    layer = MoE(config, D, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=0))
    layer.router.kernel[...] *= 8  # unequal loads
    graphdef, state = nnx.split(layer)
    factor = config.capacity_factor if is_training else None
    return layer, jax.jit(
        lambda x, m: nnx.merge(graphdef, state)(x, info_of(config, m, factor, trace=True))
    )


def layer_case(is_training=True, **changes):
    """The layer's output and statistics, the oracle's fate of each choice, and their weights before
    capacity.
    """
    base = {"num_experts": E, "top_k": 2, "d_expert": 8, "score": "softmax", "dispatch": "capacity"}
    config = MoeConfig(**(base | {"capacity_factor": 0.7, "allow_noncausal": True} | changes))
    rng = np.random.default_rng(3)
    x_BLD, mask_BL = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32), rng.random((B, L)) < 0.9
    layer, run = layer_run(config, is_training)
    y_BLD, stats = run(x_BLD, mask_BL)
    routing = jax.device_get(stats.routing)
    factor = config.capacity_factor if is_training else config.eval_capacity_factor
    groups = {"sequence": B, "device": 1, "global": 1}[config.capacity_group]
    limit = oracle.capacity(factor, 2, B * L // groups, E) if factor else B * L
    final_TK = oracle_overflow.apply_capacity(
        routing.experts_TK, routing.logits_TE, routing.weights_TK, limit,
        num_experts=E, num_groups=groups, order=config.capacity_order, overflow=config.overflow,
    )  # fmt: skip
    return config, layer, x_BLD, mask_BL, np.asarray(y_BLD), stats, routing, final_TK


def expected_output(config, layer, x_BLD, routing, final_TK):
    """Loops over tokens; weights of the survivors as the overflow rule says."""
    gate_up_EDPF, down_EFD = (
        np.asarray(w[...], np.float64) for w in (layer.experts.gate_up, layer.experts.down)
    )
    y_TD, mass = np.zeros((B * L, D)), 0.0
    for t, x_D in enumerate(np.asarray(x_BLD, np.float64).reshape(-1, D)):
        if routing.experts_TK[t, 0] == E:
            continue
        held = [
            old if new is None else new
            for old, new in zip(routing.experts_TK[t], final_TK[t], strict=True)
        ]
        weights = oracle_routers.weigh_one(
            routing.logits_TE[t], held, "softmax", config.renormalize
        )
        if config.overflow == "renormalize":
            alive = sum(w for w, new in zip(weights, final_TK[t], strict=True) if new is not None)
            weights = [w * sum(weights) / alive if alive else 0.0 for w in weights]
        for weight, e in zip(weights, final_TK[t], strict=True):
            if e is not None:
                y_TD[t] += weight * oracle.swiglu(x_D, gate_up_EDPF[e], down_EFD[e])
                mass += weight
    return y_TD.reshape(B, L, D), mass


@overflows
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("group", "order"),
    [
        ("sequence", "position"),
        ("sequence", "weight"),
        ("global", "choice"),
        ("device", "position"),
    ],
)
def test_the_layer_gives_survivors_the_weights_that_the_rule_says_and_counts_each_cause(
    overflow, renormalize, group, order
):
    case = layer_case(
        overflow=overflow, renormalize=renormalize, capacity_group=group, capacity_order=order
    )
    config, layer, x_BLD, _, y_BLD, stats, routing, final_TK = case
    expected_BLD, mass = expected_output(config, layer, x_BLD, routing, final_TK)
    oracle.assert_close(y_BLD, expected_BLD)
    dropped = sum(e is None for row in final_TK for e in row)
    moved = sum(
        e is not None and e != old
        for row, olds in zip(final_TK, routing.experts_TK, strict=True)
        for e, old in zip(row, olds, strict=True)
    )
    unserved = sum(all(e is None for e in row) for row in final_TK)
    assert (float(stats.dropped), float(stats.moved), float(stats.unserved)) == (
        dropped,
        moved,
        unserved,
    )
    assert moved > 0 if overflow == "next" else dropped > 0 and moved == 0
    np.testing.assert_allclose(float(stats.gate_mass), mass, rtol=1e-5)


def test_evaluation_drops_nothing_unless_its_own_factor_says_so():
    config, layer, x_BLD, _, y_BLD, stats, routing, _ = layer_case(is_training=False)
    assert stats.dropped == 0
    everyone = [[int(e) if e < E else None for e in row] for row in routing.experts_TK]
    oracle.assert_close(y_BLD, expected_output(config, layer, x_BLD, routing, everyone)[0])
    *_, tight, _, _ = layer_case(is_training=False, eval_capacity_factor=0.5)
    assert tight.dropped > 0


@pytest.mark.parametrize(
    ("moe", "parts"),
    [
        (
            {"capacity_order": "weight", "dispatch": "capacity"},
            ["moe.capacity_order=weight", "moe.allow_noncausal"],
        ),
        (
            {"capacity_order": "choice", "dispatch": "capacity"},
            ["moe.capacity_order=choice", "moe.allow_noncausal"],
        ),
        (
            {"capacity_factor": 9.0, "dispatch": "capacity"},
            ["moe.capacity_factor=9.0", "moe.num_experts=8"],
        ),
        ({"eval_capacity_factor": -1.0, "dispatch": "capacity"}, ["moe.eval_capacity_factor=-1.0"]),
        ({"eval_capacity_factor": 1.0}, ["moe.eval_capacity_factor=1.0", "moe.dispatch=capacity"]),
        ({"overflow": "next", "router": "hash"}, ["moe.overflow=next", "moe.router=hash"]),
        (
            {"overflow": "renormalize", "top_k": 1, "renormalize": False},
            ["moe.overflow=renormalize", "moe.top_k=1"],
        ),
        (
            {"dispatch": "capacity", "router": "expert_choice", "allow_noncausal": True},
            ["moe.dispatch=capacity", "moe.router=expert_choice"],
        ),
    ],
)
def test_capacity_that_does_not_go_together_is_refused(moe, parts):
    with pytest.raises(ConfigError) as caught:
        resolve({"moe": {"d_expert": 8} | moe})
    assert all(part in str(caught.value) for part in parts), str(caught.value)
