"""Attention by experts against loops over queries, experts and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.config import refusal
from cases.training import case_config
from moejax.config import AttentionConfig, MoeConfig
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.routed import RoutedAttention

B, L, WIDTH, GROUPS, HEAD, EXPERTS, TOP_K = 2, 6, 10, 2, 4, 5, 3
THETA = 100.0
SEGMENTS_BL = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
POSITIONS_BL = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])


def make(**options):
    """Returns the module with random weights, also of its bias, and the weights by name."""
    config = AttentionConfig(
        kind="routed",
        num_query_experts=EXPERTS,
        top_k_query_experts=TOP_K,
        num_heads=TOP_K * GROUPS,
        num_kv_heads=GROUPS,
        head_dim=HEAD,
        rope_theta=THETA,
        **options,
    )
    router = MoeConfig(num_experts=EXPERTS, top_k=TOP_K, score="softmax")
    rngs = nnx.Rngs(params=0)
    module = RoutedAttention(config, router, WIDTH, jnp.dtype("float32"), rngs=rngs)
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, jnp.float32), state)
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    return config, nnx.merge(graphdef, state), weights


def turned(x_A, position):
    """Pairs of dimensions as complex numbers, turned."""
    half = len(x_A) // 2
    frequency_a = THETA ** (-np.arange(half) / half)
    pair_a = (x_A[:half] + 1j * x_A[half:]) * np.exp(1j * position * frequency_a)
    return np.concatenate([pair_a.real, pair_a.imag])


@pytest.mark.parametrize("options", [{}, {"out_bias": True, "score_factor": 1.7}], ids=str)
def test_routed_attention_equals_the_loop_over_queries_experts_and_keys(options):
    config, module, w = make(**options)
    rng = np.random.default_rng(2)
    x_BLD = rng.normal(size=(B, L, WIDTH)).astype(np.float32)

    def mixed(b, i, expert, g):
        query_A = turned(x_BLD[b, i] @ w["query"][expert, :, g], POSITIONS_BL[b, i])
        seen = [j for j in range(i + 1) if SEGMENTS_BL[b, j] == SEGMENTS_BL[b, i]]
        keys = [turned(x_BLD[b, j] @ w["key_value"][:, 0, g], POSITIONS_BL[b, j]) for j in seen]
        scale = config.score_factor / np.sqrt(HEAD)
        probs = oracle.softmax([query_A @ key_A * scale for key_A in keys])
        values = [x_BLD[b, j] @ w["key_value"][:, 1, g] for j in seen]
        return sum(p * value_A for p, value_A in zip(probs, values, strict=True))

    expected = np.zeros((B, L, WIDTH))
    experts_BLK = np.zeros((B, L, TOP_K), int)
    for b, i in np.ndindex(B, L):
        logits_E = x_BLD[b, i] @ w["router"]["kernel"]
        experts_BLK[b, i] = np.argsort(-logits_E)[:TOP_K]
        weights = oracle.softmax(logits_E[experts_BLK[b, i]])
        for expert, weight in zip(experts_BLK[b, i], weights, strict=True):
            for g in range(GROUPS):
                expected[b, i] += weight * mixed(b, i, expert, g) @ w["out"][expert, g]
    if config.out_bias:
        expected += w["out_bias"]
    info = TokenInfo(jnp.asarray(SEGMENTS_BL) > 0, trace=True)
    y_BLD, stats, cache = module.attend(
        jnp.asarray(x_BLD), jnp.asarray(POSITIONS_BL), jnp.asarray(SEGMENTS_BL), None, info
    )
    assert cache is None
    is_token_BL = SEGMENTS_BL > 0
    oracle.assert_close(np.asarray(y_BLD)[is_token_BL], expected[is_token_BL])
    # Padding chooses no expert.
    counts_E = np.bincount(experts_BLK[is_token_BL].reshape(-1), minlength=EXPERTS)
    np.testing.assert_array_equal(stats.assignments_E, counts_E)
    assert float(stats.num_tokens) == is_token_BL.sum()
    assert np.asarray(stats.routing.experts_TK)[~is_token_BL.reshape(-1)].tolist() == 3 * [
        TOP_K * [EXPERTS]
    ]


def test_a_cache_gives_what_the_row_gives():
    _, module, _ = make(out_bias=True)
    x_BLD = jax.random.normal(jax.random.key(0), (B, L, WIDTH))
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    expected_BLD, _ = module(x_BLD, positions_BL, jnp.ones((B, L), jnp.int32))
    cache = module.init_cache(B, L + 2)
    first_BLD, cache = module(x_BLD[:, :4], positions_BL[:, :4], cache=cache)
    found = [first_BLD]
    for i in range(4, L):
        y_B1D, cache = module(x_BLD[:, i : i + 1], positions_BL[:, i : i + 1], cache=cache)
        found.append(y_B1D)
    oracle.assert_close(jnp.concatenate(found, axis=1), expected_BLD)
    with pytest.raises(ValueError, match="needs segments_BL"):
        module(x_BLD, positions_BL)


def test_its_router_has_the_losses_of_the_other_one_that_fit():
    config = case_config("routed attention", moe={"z_weight": 0.5})
    router = config.attention_router
    assert (router.num_experts, router.top_k, router.renormalize) == (6, 3, True)
    assert router.z_weight == 0.5 and router.sequence_balance_weight == 0.01
    assert router.weighted_losses.keys() == {"balance", "sequence_balance", "z"}


def test_what_cannot_be_is_refused():
    routed = {"attention.kind": "routed"}
    for leaves, fragment in (
        (
            {"attention.top_k_query_experts": 9, "attention.num_heads": 18},
            "attention.top_k_query_experts=9 must be at most",
        ),
        ({"attention.num_heads": 8}, "attention.num_heads=8 must be 4: a query head of each of"),
        ({"moe.first_dense": 1}, "attention.kind=routed needs experts in every layer"),
        ({"model.shortcut": True}, "attention.kind=routed with model.shortcut=True"),
    ):
        assert fragment in refusal(routed | leaves)
