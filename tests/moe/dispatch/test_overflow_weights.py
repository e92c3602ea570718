"""`moe.overflow=renormalize`: survivors share the weight of all, whatever leads them, in values and
in gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.moe import info_of
from moejax.config import MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.moe.layer import MoE
from moejax.moe.router import RouterInputs, route
from moejax.moe.router.scores import spread_over_survivors

E, G = 6, 3
LEADS = [0.0, 10.0, 44.0, 100.0, 1000.0]
CASES = {
    "softmax, renormalised": {"router": "softmax_topk", "top_k": 3},
    "softmax": {"router": "softmax_topk", "top_k": 3, "renormalize": False},
    "softmax after": {"router": "softmax_topk", "top_k": 3, "score": "softmax_after"},
    "sigmoid, renormalised": {"router": "sigmoid_topk", "top_k": 3},
    "sigmoid": {"router": "sigmoid_topk", "top_k": 3, "renormalize": False},
    "sqrt_softplus": {
        "router": "sigmoid_topk",
        "score": "sqrt_softplus",
        "top_k": 3,
        "route_scale": 2.5,
    },
    "noisy": {"router": "noisy_topk", "top_k": 3},
    "quantile": {"router": "quantile", "score": "sigmoid", "top_k": 3},
    "hash": {"router": "hash", "score": "sqrt_softplus", "top_k": 3},
    "hierarchical": {"router": "hierarchical", "num_groups": G, "top_k_groups": 2, "top_k": 4},
}


def log_scores(logits_E, score):
    """Of complex numbers, too, in float64 without underflow."""
    shift = np.max(logits_E.real)
    if score.startswith("softmax"):
        return logits_E - shift - np.log(np.exp(logits_E - shift).sum())
    positive = np.maximum(
        logits_E.real, 0
    )  # log(1 + exp l) = positive + log(exp(-positive) + exp(l - positive))
    softplus_E = positive + np.log(np.exp(-positive) + np.exp(logits_E - positive))
    if score == "sigmoid":
        return logits_E - softplus_E
    small = logits_E.real < -30
    return 0.5 * np.where(small, logits_E, np.log(np.where(small, 1.0, softplus_E)))


def log_softmax(values):
    return log_scores(np.asarray(values), "softmax")


def shared_weights(logits_E, group_logits_G, experts, kept, config):
    """Weights of all choices, of which the kept ones take shares as their scores have; in float64,
    by logarithms.
    """
    chosen = np.array([logits_E[e] for e in experts])
    if config.router == "hierarchical":
        per_group = config.top_k // config.top_k_groups
        groups = [experts[k] // (E // G) for k in range(0, len(experts), per_group)]
        between = log_softmax([group_logits_G[g] for g in groups])
        within = [log_softmax(part) for part in np.split(chosen, len(groups))]
        logs = np.concatenate([b + w for b, w in zip(between, within, strict=True)])
    else:
        logs = np.array([log_scores(logits_E, config.score)[e] for e in experts])
    is_whole = config.renormalize or config.router == "hierarchical"
    total = config.route_scale * (1.0 if is_whole else np.exp(logs).sum())
    weights = np.zeros(len(experts), complex)
    if np.any(kept):
        weights[kept] = total * np.exp(log_softmax(logs[kept]))
    return weights


@functools.cache
def ours(config):
    """Weights, experts and the gradient of the sum of the weights times some numbers, for logits of
    experts, groups.
    """

    def weights_of(logits_TE, group_logits_TG, is_kept_TK):
        tokens = len(logits_TE)
        inputs = RouterInputs(
            logits_TE,
            jnp.ones(tokens, bool),
            tokens,
            tokens_T=jnp.arange(tokens, dtype=jnp.int32),
            table_VK=jnp.broadcast_to(
                jnp.arange(config.top_k, dtype=jnp.int32), (tokens, config.top_k)
            ),
            group_logits_TG=group_logits_TG,
            noise_scale_TE=jnp.ones(logits_TE.shape),
            bias_E=jnp.zeros(E) if config.has_selection_bias else None,
        )
        routing = route(inputs, config)
        weights_TK = spread_over_survivors(routing.weights_TK, routing.log_weights_TK, is_kept_TK)
        return weights_TK, routing.experts_TK

    def objective(logits_TE, group_logits_TG, is_kept_TK, factors_TK):
        weights_TK, experts_TK = weights_of(logits_TE, group_logits_TG, is_kept_TK)
        return jnp.sum(weights_TK * factors_TK), (weights_TK, experts_TK)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


@pytest.mark.parametrize("case", CASES)
def test_survivors_share_by_their_scores_however_far_they_are_behind(case):
    config = derive_moe(MoeConfig(num_experts=E, d_expert=4, **CASES[case]), 8)
    rng = np.random.default_rng(0)
    # The first choice leads by so much, and is dropped in half of the tokens.
    leads_T = np.array(LEADS * 2)
    logits_TE = rng.normal(size=(len(leads_T), E))
    logits_TE[:, 0] = 3.0 + leads_T
    logits_TE -= (
        leads_T[:, None] * (np.arange(len(leads_T)) % 3 == 1)[:, None]
    )  # it is the others that are far away
    group_logits_TG = rng.normal(size=(len(leads_T), G))
    logits_TE, group_logits_TG = (a.astype(np.float32) for a in (logits_TE, group_logits_TG))
    is_kept_TK = np.ones((len(leads_T), config.top_k), bool)
    is_kept_TK[: len(LEADS), 0] = False
    is_kept_TK[1::2, 2] = False
    factors_TK = rng.normal(size=is_kept_TK.shape).astype(np.float32)
    (_, (weights_TK, experts_TK)), gradients = ours(config)(
        logits_TE, group_logits_TG, is_kept_TK, factors_TK
    )
    dlogits_TE, dgroups_TG = (np.asarray(g) for g in gradients)
    for t in range(len(leads_T)):
        experts, kept = np.asarray(experts_TK[t]).tolist(), is_kept_TK[t]
        exact_E, exact_G = (
            logits_TE[t].astype(np.complex128),
            group_logits_TG[t].astype(np.complex128),
        )
        expected = shared_weights(exact_E, exact_G, experts, kept, config).real
        np.testing.assert_allclose(weights_TK[t], expected, rtol=3e-5, atol=1e-7)

        def objective(values, experts=experts, kept=kept, t=t):
            return factors_TK[t] @ shared_weights(values[:E], values[E:], experts, kept, config)

        # The derivative is exact: a complex step subtracts nothing.
        values, step = np.concatenate([exact_E, exact_G]), 1e-30
        expected = np.array(
            [objective(values + 1j * step * np.eye(E + G)[i]).imag / step for i in range(E + G)]
        )
        actual = np.concatenate([dlogits_TE[t], dgroups_TG[t]])
        np.testing.assert_allclose(
            actual, expected, rtol=1e-4, atol=2e-6, err_msg=f"lead {leads_T[t]}"
        )


@pytest.mark.parametrize("lead", LEADS)
def test_a_layer_whose_first_choice_overflows_has_the_survivors_output_and_gradient(lead):
    config = derive_moe(
        MoeConfig(
            num_experts=3,
            top_k=2,
            d_expert=4,
            dispatch="capacity",
            capacity_factor=0.5,
            overflow="renormalize",
        ),
        4,
    )
    layer = MoE(config, 2, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=0))
    # All want expert 0 first; then they take turns between the others, which have room.
    layer.router.kernel[...] = jnp.asarray([[lead + 2, 0.0, 0.0], [0.0, 2.0, -2.0]])
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    x_BLD = jnp.asarray([[[1.0, 0.5], [1.0, -0.5], [1.0, 0.5], [1.0, -0.5]]])
    info = info_of(
        config, np.ones((1, 4), bool), factor=0.5
    )  # 2 slots: the last two tokens find none of expert 0

    @jax.jit
    def run(params, x_BLD):
        y_BLD, stats = nnx.merge(graphdef, params, rest)(x_BLD, info)
        return jnp.sum(y_BLD**2), (y_BLD, stats.gate_mass, stats.dropped)

    (_, (y_BLD, mass, dropped)), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(
        params, x_BLD
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(mass, 4.0, rtol=1e-6)  # 1 for each token
    assert (
        float(dropped) == 2 and np.isfinite(y_BLD).all() and np.asarray(y_BLD[0]).any(axis=1).all()
    )


def test_an_oracle_by_logarithms_is_the_quotient_where_nothing_underflows():
    config = derive_moe(MoeConfig(num_experts=E, d_expert=4, **CASES["sigmoid"]), 8)
    logits_E = np.random.default_rng(0).normal(size=E)
    scores = 1 / (1 + np.exp(-logits_E[[0, 2, 4]]))
    kept = np.array([False, True, True])
    actual = shared_weights(logits_E.astype(complex), np.zeros(G), [0, 2, 4], kept, config)
    oracle.assert_close(actual.real, kept * scores * scores.sum() / scores[1:].sum(), rtol=1e-12)
