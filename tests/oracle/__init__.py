"""The truth for routing, dispatch, experts and losses: float64 NumPy that loops over tokens and
experts.

Written from the formulas of the papers, not from `moejax`, and meant to be read: no sorting tricks,
no vectorisation over tokens. For gradients there is an independent dense formulation in JAX (every
expert sees every token, and the oracle's selection is a mask), to be differentiated by `jax.grad`.
At the end, two tools for reading traced programs.

Axis letters as in `moejax/moe/__init__.py`.
"""

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Arrays of one MoE layer; the shared ones are None where there is no shared expert."""

    router_DE: np.ndarray
    gate_up_ED2F: np.ndarray
    down_EFD: np.ndarray
    shared_gate_up_D2F: np.ndarray | None = None
    shared_down_FD: np.ndarray | None = None


jax.tree_util.register_dataclass(LayerWeights)


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What the oracle's layer computed; masked tokens have expert -1, weight 0 and are not kept."""

    y_BLD: np.ndarray
    logits_BLE: np.ndarray
    probs_BLE: np.ndarray
    experts_BLK: np.ndarray
    weights_BLK: np.ndarray
    kept_BLK: np.ndarray
    mask_BL: np.ndarray


# Routing
# --------------------------------------------------------------------------------------------------


def softmax(logits):
    """exp(l) / sum exp(l) of one vector."""
    exponentials = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exponentials / exponentials.sum()


def logsumexp(logits):
    """log sum exp(l) of one vector."""
    highest = float(np.max(logits))
    return highest + math.log(sum(math.exp(float(logit) - highest) for logit in logits))


def route_one(logits_E, top_k, renormalize):
    """Experts and weights of one token: the `top_k` most probable, ties to the lowest index."""
    probs_E = softmax(logits_E)
    experts = sorted(range(len(probs_E)), key=lambda e: (-float(logits_E[e]), e))[:top_k]
    weights = [probs_E[e] for e in experts]
    if renormalize:
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return probs_E, experts, weights


def capacity(capacity_factor, top_k, length, num_experts):
    """ceil(capacity_factor * K * L / E), between 1 and L, without rounding: 1.1 means eleven
    tenths.
    """
    return min(
        length, max(1, math.ceil(Fraction(str(capacity_factor)) * top_k * length / num_experts))
    )


def keep_within_capacity(experts_BLK, num_experts, limit):
    """Which choices find a slot: in each sequence, in order of position and then of rank, `limit`
    for each expert.
    """
    kept_BLK = np.zeros(experts_BLK.shape, bool)
    for b, experts_LK in enumerate(experts_BLK):
        taken = [0] * num_experts
        for t, experts_K in enumerate(experts_LK):
            for k, e in enumerate(experts_K):
                if e >= 0 and taken[e] < limit:
                    taken[e] += 1
                    kept_BLK[b, t, k] = True
    return kept_BLK


# Experts and the layer
# --------------------------------------------------------------------------------------------


def swiglu(x_D, gate_up_D2F, down_FD):
    """down(silu(gate(x)) * up(x)) of one vector."""
    gate, up = x_D @ gate_up_D2F[:, 0], x_D @ gate_up_D2F[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ down_FD


def layer(x_BLD, mask_BL, weights: LayerWeights, *, top_k, renormalize, limit=None) -> LayerResult:
    """The MoE layer, token by token.

    Args:
      x_BLD: inputs.
      mask_BL: False at padding.
      weights: of the layer.
      top_k: experts per token.
      renormalize: make the selected weights sum to 1.
      limit: slots of an expert for one sequence; None is dropless.
    """
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    x_BLD, mask_BL = np.asarray(x_BLD, np.float64), np.asarray(mask_BL)
    batch, length, width = x_BLD.shape
    num_experts = weights.router_DE.shape[1]
    logits_BLE = np.zeros((batch, length, num_experts))
    probs_BLE = np.zeros((batch, length, num_experts))
    experts_BLK = np.full((batch, length, top_k), -1)
    weights_BLK = np.zeros((batch, length, top_k))
    for b in range(batch):
        for t in range(length):
            if mask_BL[b, t]:
                logits_BLE[b, t] = x_BLD[b, t] @ weights.router_DE
                probs_BLE[b, t], experts_BLK[b, t], weights_BLK[b, t] = route_one(
                    logits_BLE[b, t], top_k, renormalize
                )
    kept_BLK = keep_within_capacity(experts_BLK, num_experts, length if limit is None else limit)
    y_BLD = np.zeros((batch, length, width))
    for b in range(batch):
        for t in range(length):
            for k, e in enumerate(experts_BLK[b, t]):
                if kept_BLK[b, t, k]:
                    y_e = swiglu(x_BLD[b, t], weights.gate_up_ED2F[e], weights.down_EFD[e])
                    y_BLD[b, t] += weights_BLK[b, t, k] * y_e
            if mask_BL[b, t] and weights.shared_gate_up_D2F is not None:
                y_BLD[b, t] += swiglu(
                    x_BLD[b, t], weights.shared_gate_up_D2F, weights.shared_down_FD
                )
    return LayerResult(y_BLD, logits_BLE, probs_BLE, experts_BLK, weights_BLK, kept_BLK, mask_BL)


# Losses and metrics
# -----------------------------------------------------------------------------------------------


def counts(result: LayerResult):
    """How many real tokens chose each expert, before dropping."""
    counts_E = np.zeros(result.probs_BLE.shape[-1])
    for e in result.experts_BLK.ravel():
        if e >= 0:
            counts_E[e] += 1
    return counts_E


def balance_loss(result: LayerResult):
    """E * sum_e f_e P_e."""
    tokens = [tuple(index) for index in np.argwhere(result.mask_BL)]
    num_experts, top_k = result.probs_BLE.shape[-1], result.experts_BLK.shape[-1]
    counts_E = counts(result)
    total = 0.0
    for e in range(num_experts):
        fraction = counts_E[e] / (top_k * len(tokens))
        mean_prob = sum(result.probs_BLE[token][e] for token in tokens) / len(tokens)
        total += fraction * mean_prob
    return num_experts * total


def z_loss(result: LayerResult):
    """Mean of logsumexp(logits)^2."""
    tokens = [tuple(index) for index in np.argwhere(result.mask_BL)]
    return sum(logsumexp(result.logits_BLE[token]) ** 2 for token in tokens) / len(tokens)


def _is_tied(result: LayerResult, token) -> bool:
    """Whether an expert that was not chosen has exactly the logit of the worst that was."""
    chosen = set(result.experts_BLK[token].tolist())
    logits = result.logits_BLE[token].tolist()
    return min(logits[e] for e in chosen) in [
        logit for e, logit in enumerate(logits) if e not in chosen
    ]


def metrics(result: LayerResult) -> dict[str, float]:
    """Every metric of `moe/balancing/losses.py`, from the tokens themselves; nothing moves to
    another expert here.
    """
    tokens = [tuple(index) for index in np.argwhere(result.mask_BL)]
    num_experts, top_k = result.probs_BLE.shape[-1], result.experts_BLK.shape[-1]
    counts_E = counts(result)
    mean = counts_E.sum() / num_experts
    load = [count / counts_E.sum() for count in counts_E]
    dropped = [sum(not kept for kept in result.kept_BLK[token]) for token in tokens]
    logits = [float(logit) for token in tokens for logit in result.logits_BLE[token]]
    importance_E = [0.0] * num_experts
    for token in tokens:
        for e, weight in zip(result.experts_BLK[token], result.weights_BLK[token], strict=True):
            importance_E[e] += float(weight)
    importance = sum(importance_E) / num_experts
    falling = [
        [*sorted(map(float, result.probs_BLE[token]), reverse=True), 0.0] for token in tokens
    ]
    return {
        "max_violation": max(counts_E) / mean - 1,
        "load_cv": math.sqrt(sum((count - mean) ** 2 for count in counts_E) / num_experts) / mean,
        "importance_cv": math.sqrt(sum((i - importance) ** 2 for i in importance_E) / num_experts)
        / importance,
        "load_entropy": -sum(f * math.log(f) for f in load if f > 0),
        "entropy": sum(-sum(p * math.log(p) for p in result.probs_BLE[t] if p > 0) for t in tokens)
        / len(tokens),
        "idle_experts": float(sum(count == 0 for count in counts_E)),
        "dropped": sum(dropped) / (top_k * len(tokens)),
        "moved": 0.0,
        "dropped_out": 0.0,
        "buffer_overflow": 0.0,
        "unserved": sum(number == top_k for number in dropped) / len(tokens),
        "gate_mass": sum(sum(result.weights_BLK[t][result.kept_BLK[t]]) for t in tokens)
        / len(tokens),
        "top_prob": sum(max(result.probs_BLE[token]) for token in tokens) / len(tokens),
        "margin": sum(probs[top_k - 1] - probs[top_k] for probs in falling) / len(tokens),
        "ties": sum(_is_tied(result, token) for token in tokens) / len(tokens),
        "logit_rms": math.sqrt(sum(logit**2 for logit in logits) / len(logits)),
        "logit_max": max(abs(logit) for logit in logits),
    }


# Grouped products
# -------------------------------------------------------------------------------------------------


def grouped_matmul(x_RD, w_EDF, sizes_E, dy_RF):
    """The grouped product and its gradients for the cotangent `dy_RF`, row by row; zeros after the
    last group.
    """
    x_RD, w_EDF, dy_RF = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, dy_RF))
    y_RF, dx_RD, dw_EDF = np.zeros_like(dy_RF), np.zeros_like(x_RD), np.zeros_like(w_EDF)
    row = 0
    for e, size in enumerate(sizes_E):
        for _ in range(int(size)):
            y_RF[row] = x_RD[row] @ w_EDF[e]
            dx_RD[row] = w_EDF[e] @ dy_RF[row]
            dw_EDF[e] += np.outer(x_RD[row], dy_RF[row])
            row += 1
    return y_RF, dx_RD, dw_EDF


def feed_forward(x_TD, weights_TK, gate_up_ED2F, down_EFD, experts_TK, dy_TD):
    """SwiGLU experts of each token, weighed and added up, and all gradients for `dy_TD`, choice by
    choice; E: none.
    """
    x_TD, weights_TK, gate_up_ED2F, down_EFD, dy_TD = (
        np.asarray(a, np.float64) for a in (x_TD, weights_TK, gate_up_ED2F, down_EFD, dy_TD)
    )
    y_TD, dx_TD, dweights_TK = np.zeros_like(x_TD), np.zeros_like(x_TD), np.zeros_like(weights_TK)
    dgate_up_ED2F, ddown_EFD = np.zeros_like(gate_up_ED2F), np.zeros_like(down_EFD)
    for t, k in np.ndindex(weights_TK.shape):
        e, weight, x_D, dy_D = experts_TK[t, k], weights_TK[t, k], x_TD[t], dy_TD[t]
        if e == len(down_EFD):
            continue
        gate_F, up_F = x_D @ gate_up_ED2F[e, :, 0], x_D @ gate_up_ED2F[e, :, 1]
        sigmoid_F = 1 / (1 + np.exp(-gate_F))
        hidden_F = gate_F * sigmoid_F * up_F
        y_TD[t] += weight * (hidden_F @ down_EFD[e])
        dweights_TK[t, k] = hidden_F @ down_EFD[e] @ dy_D
        dhidden_F = weight * (down_EFD[e] @ dy_D)
        dgate_F = dhidden_F * up_F * sigmoid_F * (1 + gate_F * (1 - sigmoid_F))
        dup_F = dhidden_F * gate_F * sigmoid_F
        dx_TD[t] += gate_up_ED2F[e, :, 0] @ dgate_F + gate_up_ED2F[e, :, 1] @ dup_F
        dgate_up_ED2F[e] += np.stack([np.outer(x_D, dgate_F), np.outer(x_D, dup_F)], axis=1)
        ddown_EFD[e] += np.outer(weight * hidden_F, dy_D)
    return y_TD, dx_TD, dweights_TK, dgate_up_ED2F, ddown_EFD


# The dense formulation, for gradients
# -----------------------------------------------------------------------------


def selection(result: LayerResult):
    """The oracle's choices as masks over experts: `(chosen_BLE, kept_BLE)`, 0 or 1."""
    num_experts = result.probs_BLE.shape[-1]
    chosen_BLE, kept_BLE = (
        np.zeros((*result.mask_BL.shape, num_experts), np.float32) for _ in range(2)
    )
    for b, t, k in np.ndindex(result.experts_BLK.shape):
        if result.mask_BL[b, t]:
            chosen_BLE[b, t, result.experts_BLK[b, t, k]] = 1
            kept_BLE[b, t, result.experts_BLK[b, t, k]] = result.kept_BLK[b, t, k]
    return chosen_BLE, kept_BLE


def dense_objective(
    x_BLD,
    weights: LayerWeights,
    mask_BL,
    chosen_BLE,
    kept_BLE,
    cotangent_BLD,
    balance_weight,
    z_weight,
    renormalize,
):
    """<cotangent, layer output> + weighted auxiliary losses, with every expert computed for every
    token.
    """

    def feed_forward(x, gate_up, down):
        gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
        return (gate * jax.nn.sigmoid(gate) * up) @ down

    mask_BL1 = mask_BL[..., None].astype(jnp.float32)
    logits_BLE = x_BLD @ weights.router_DE
    exponentials_BLE = jnp.exp(
        logits_BLE - jax.lax.stop_gradient(logits_BLE.max(-1, keepdims=True))
    )
    probs_BLE = exponentials_BLE / exponentials_BLE.sum(-1, keepdims=True)
    gates_BLE = probs_BLE * chosen_BLE
    if renormalize:
        gates_BLE = gates_BLE / (gates_BLE.sum(-1, keepdims=True) + (1 - mask_BL1))
    y_EBLD = jax.vmap(feed_forward, in_axes=(None, 0, 0))(
        x_BLD, weights.gate_up_ED2F, weights.down_EFD
    )
    y_BLD = jnp.einsum("BLE,EBLD->BLD", gates_BLE * kept_BLE, y_EBLD)
    if weights.shared_gate_up_D2F is not None:
        y_BLD += mask_BL1 * feed_forward(x_BLD, weights.shared_gate_up_D2F, weights.shared_down_FD)
    num_tokens = mask_BL.sum()
    fraction_E = chosen_BLE.sum((0, 1)) / chosen_BLE.sum()
    mean_prob_E = (probs_BLE * mask_BL1).sum((0, 1)) / num_tokens
    balance = chosen_BLE.shape[-1] * jnp.sum(fraction_E * mean_prob_E)
    z = jnp.sum(mask_BL * jax.scipy.special.logsumexp(logits_BLE, axis=-1) ** 2) / num_tokens
    return jnp.sum(cotangent_BLD * y_BLD) + balance_weight * balance + z_weight * z


# Comparing and reading programs
# -----------------------------------------------------------------------------------


def add(first, second):
    """The sum of two trees of arrays, as microbatches and devices add up."""
    return jax.tree.map(jnp.add, first, second)


def assert_close(actual, expected, rtol=1e-5, err_msg=""):
    """Equal in shape and within `rtol` of the largest magnitude, leaf by leaf, never NaN; a list is
    an array.

    Logits of ids that are no token (-1e30) do not count for the magnitude: next to it anything
    would be equal.
    """
    actual_leaves, expected_leaves = (
        jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, list)) for tree in (actual, expected)
    )
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        scale = np.abs(e[np.abs(e) < 1e29]).max(initial=0.0)
        np.testing.assert_allclose(
            a, e, rtol=rtol, atol=rtol * scale, equal_nan=False, err_msg=err_msg
        )


def equations(jaxpr) -> Iterator:
    """Every equation of a traced program, those of inner programs (loops, branches, calls)
    included.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                yield from equations(parameter)


def primitives(jaxpr) -> list[str]:
    """The names of all its primitives, inner programs included."""
    return [equation.primitive.name for equation in equations(jaxpr)]
