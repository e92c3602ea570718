"""Summarises the routing of a logging interval from the outputs of its steps."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from moejax.training.step import StepOutput

LARGEST = ("logit_max",)
"""Metrics of a layer of which an interval keeps the largest value, not the mean."""

NORMS = ("gradient_norms", "update_norms", "weight_norms")
"""Norms of the weights of each expert, and of what belongs to them."""

LAYER_METRICS = (
    "max_violation",
    "load_cv",
    "importance_cv",
    "load_entropy",
    "entropy",
    "idle_experts",
    "dropped",
    "moved",
    "dropped_out",
    "unserved",
    "buffer_overflow",
    "gate_mass",
    "top_prob",
    "margin",
    "ties",
    "logit_rms",
    "logit_max",
)
"""The metrics that `balance.routing_metrics` gives for each layer, in the order of the log."""


@dataclasses.dataclass(frozen=True)
class RoutingInterval:
    """The routing of one logging interval, by MoE layer.

    Steps in which a layer's probabilities or weights are not finite are not applied; they count in
    none of its sums.

    Attributes:
      counts_NE: assignments to each expert, before any are dropped.
      choices_N: experts per token, in the mean, before any are dropped.
      probs_NE: mean router probability, in [0, 1].
      importance_NE: mean combine weight, before any are dropped.
      idle_steps_NE: steps since each expert was last chosen, at the end.
      bias_NE: selection bias at the end, NaN in layers without one; None if no layer has one.
      norms: `gradient_norms`, `update_norms` and `weight_norms` of the weights of each expert,
        [N, E], means over the steps that have them; NaN of an expert without weights. Those of
        frozen ones are absent.
      layers: `LAYER_METRICS`, each [N]: means over the steps in which they were finite, NaN if they
        never were. Of those in `LARGEST` it is the largest value, NaN if one was not finite.
    """

    counts_NE: Int[np.ndarray, "N E"]
    choices_N: Float[np.ndarray, "N"]
    probs_NE: Float[np.ndarray, "N E"]
    importance_NE: Float[np.ndarray, "N E"]
    idle_steps_NE: Int[np.ndarray, "N E"]
    bias_NE: Float[np.ndarray, "N E"] | None
    layers: Mapping[str, Float[np.ndarray, "N"]]
    norms: Mapping[str, Float[np.ndarray, "N E"]] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that `RoutingLog.append` takes."""
        layers_NM = np.stack([self.layers[name] for name in LAYER_METRICS], axis=1)
        arrays = {
            "counts": self.counts_NE,
            "probs": self.probs_NE.astype(np.float32),
            "importance": self.importance_NE.astype(np.float32),
            "idle_steps": self.idle_steps_NE,
            "layers": layers_NM.astype(np.float32),
        }
        if self.bias_NE is not None:
            arrays["bias"] = self.bias_NE
        for name, norms_NE in self.norms.items():
            arrays[name] = norms_NE.astype(np.float32)
        return arrays


def summarize_routing(outputs: Sequence[StepOutput]) -> RoutingInterval | None:
    """Sums up the steps of an interval, whose outputs are on the host; None for a dense model."""
    sums = [output.routing for output in outputs if output.routing is not None]
    if not sums:
        return None
    counts_SNE = np.stack([each.assignments_E for each in sums])
    probs_SNE = np.stack([each.probs_E for each in sums])
    importance_SNE = np.stack([each.importance_E for each in sums])
    tokens_SN = np.stack([each.num_tokens for each in sums])
    is_finite_SNE = np.isfinite(probs_SNE + importance_SNE)
    is_sound_SN1 = is_finite_SNE.all(axis=2, keepdims=True)

    def total(values: np.ndarray, dtype: type) -> np.ndarray:
        """Sums over the steps in which the routing of a layer is finite."""
        return np.where(is_sound_SN1, values, 0).sum(axis=0, dtype=dtype)

    tokens_N1 = total(tokens_SN[..., None], np.float64)
    counts_NE = total(counts_SNE, np.int64)

    def mean_over_tokens(values_SNE: np.ndarray) -> np.ndarray:
        total_NE = total(values_SNE, np.float64)
        mean_NE = total_NE / np.maximum(tokens_N1, 1)
        return np.where(is_sound_SN1.any(axis=0), mean_NE, np.nan)

    layers = {}
    for name in LAYER_METRICS:
        values_SN = np.stack([output.layers[name] for output in outputs])
        layers[name] = _over_steps(name, values_SN.astype(np.float64))
    state = outputs[-1].state
    return RoutingInterval(
        counts_NE=counts_NE,
        choices_N=counts_NE.sum(axis=1) / np.maximum(tokens_N1[:, 0], 1),
        probs_NE=mean_over_tokens(probs_SNE),
        importance_NE=mean_over_tokens(importance_SNE),
        idle_steps_NE=np.asarray(state["idle_steps"]),
        bias_NE=np.asarray(state["bias"]) if "bias" in state else None,
        layers=layers,
        norms=_norms(outputs),
    )


def _norms(outputs: Sequence[StepOutput]) -> dict[str, Float[np.ndarray, "N E"]]:
    """Returns the norms of experts over an interval, means over the steps that have them."""
    norms = {}
    for name in NORMS:
        # Steps of an interval that an earlier version began have none.
        known = [np.asarray(each.state[name]) for each in outputs if name in each.state]
        if known:
            norms[name] = _finite_mean(np.stack(known))
    return norms


def _over_steps(name: str, values_SN: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N"]:
    """Returns the mean of a metric over the steps in which it was finite, or its largest value."""
    is_finite_SN = np.isfinite(values_SN)
    if name in LARGEST:
        is_finite_N = is_finite_SN.all(axis=0)
        return np.where(is_finite_N, values_SN.max(axis=0), np.nan)
    return _finite_mean(values_SN)


def _finite_mean(values_SX: np.ndarray) -> np.ndarray:
    """Returns means over the first axis of the values that are finite; NaN where none is."""
    is_finite_SX = np.isfinite(values_SX)
    num_finite_X = is_finite_SX.sum(axis=0)
    total_X = np.where(is_finite_SX, values_SX, 0.0).sum(axis=0)
    return np.where(num_finite_X > 0, total_X / np.maximum(num_finite_X, 1), np.nan)
