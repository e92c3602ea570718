"""What routing did during a logging interval, from the outputs of its steps."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from moejax.training.step import StepOutput

LARGEST = ("logit_max",)
"""Metrics of a layer of which an interval keeps the largest value, not the mean."""

LAYER_METRICS = (
    "max_violation", "load_cv", "importance_cv", "load_entropy", "entropy", "idle_experts", "dropped", "moved",
    "dropped_out", "unserved", "buffer_overflow", "gate_mass", "top_prob", "margin", "ties", "logit_rms", "logit_max",
)  # fmt: skip
"""What `balance.routing_metrics` says of each layer, in the order in which it is logged."""


@dataclasses.dataclass(frozen=True)
class RoutingInterval:
    """The routing of one logging interval, by MoE layer.

    Steps in which a layer's probabilities or weights are not finite, which are not applied, count
    in none of its sums.

    Attributes:
      counts_NE: assignments to each expert, before any are dropped.
      choices_N: experts per token, in the mean, before any are dropped.
      probs_NE: mean router probability, in [0, 1].
      importance_NE: mean combine weight, before any are dropped.
      idle_steps_NE: steps since each expert was last chosen, at the end.
      bias_NE: selection bias at the end, NaN in layers without one; None if no layer has one.
      layers: `LAYER_METRICS`, each [N]: means over the steps in which they were finite, the largest
        of `LARGEST`; NaN if they never were, and of `LARGEST` if they once were not.
    """

    counts_NE: Int[np.ndarray, "N E"]
    choices_N: Float[np.ndarray, "N"]
    probs_NE: Float[np.ndarray, "N E"]
    importance_NE: Float[np.ndarray, "N E"]
    idle_steps_NE: Int[np.ndarray, "N E"]
    bias_NE: Float[np.ndarray, "N E"] | None
    layers: Mapping[str, Float[np.ndarray, "N"]]

    def arrays(self) -> dict[str, np.ndarray]:
        """What `RoutingLog.append` takes."""
        layers_NM = np.stack([self.layers[name] for name in LAYER_METRICS], axis=1).astype(
            np.float32
        )
        arrays = {
            "counts": self.counts_NE,
            "probs": self.probs_NE.astype(np.float32),
            "importance": self.importance_NE.astype(np.float32),
            "idle_steps": self.idle_steps_NE,
            "layers": layers_NM,
        }
        return arrays if self.bias_NE is None else arrays | {"bias": self.bias_NE}


def summarize_routing(outputs: Sequence[StepOutput]) -> RoutingInterval | None:
    """Sums up the steps of an interval, whose outputs are on the host; None for a dense model."""
    sums = [output.routing for output in outputs if output.routing is not None]
    if not sums:
        return None
    counts_SNE, probs_SNE, importance_SNE = (
        np.stack([getattr(s, name) for s in sums])
        for name in ("assignments_E", "probs_E", "importance_E")
    )
    is_sound_SN1 = np.isfinite(probs_SNE + importance_SNE).all(axis=2, keepdims=True)
    tokens_SN1 = np.stack([s.num_tokens for s in sums])[..., None]
    tokens_N1 = np.where(is_sound_SN1, tokens_SN1, 0).sum(axis=0, dtype=np.float64)
    counts_NE = np.where(is_sound_SN1, counts_SNE, 0).sum(axis=0, dtype=np.int64)

    def mean(values_SNE: np.ndarray) -> np.ndarray:
        total_NE = np.where(is_sound_SN1, values_SNE, 0.0).sum(axis=0, dtype=np.float64)
        return np.where(is_sound_SN1.any(axis=0), total_NE / np.maximum(tokens_N1, 1), np.nan)

    return RoutingInterval(
        counts_NE=counts_NE,
        choices_N=counts_NE.sum(axis=1) / np.maximum(tokens_N1[:, 0], 1),
        probs_NE=mean(probs_SNE),
        importance_NE=mean(importance_SNE),
        idle_steps_NE=np.asarray(outputs[-1].state["idle_steps"]),
        bias_NE=np.asarray(outputs[-1].state["bias"]) if "bias" in outputs[-1].state else None,
        layers={
            name: _over_steps(name, np.stack([o.layers[name] for o in outputs]))
            for name in LAYER_METRICS
        },
    )


def _over_steps(name: str, values_SN: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N"]:
    values_SN = values_SN.astype(np.float64)
    if name in LARGEST:
        return np.where(np.isfinite(values_SN).all(axis=0), values_SN.max(axis=0), np.nan)
    is_finite_SN = np.isfinite(values_SN)
    number_N = is_finite_SN.sum(axis=0)
    total_N = np.where(is_finite_SN, values_SN, 0.0).sum(axis=0)
    return np.where(number_N > 0, total_N / np.maximum(number_N, 1), np.nan)
