"""The rules that say when routing goes wrong, applied to one logging interval.

Each rule has a leaf of the same name in the section `alarms`, its threshold; 0 switches it off.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from moejax.config import Config, MoeConfig
from moejax.training.health.telemetry import RoutingInterval

LOW_RULES = ("balance_floor", "entropy")
"""Rules that hold below their threshold; all others hold above it."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A rule and where it holds.

    Attributes:
      rule: its name, the leaf of `alarms`.
      layers: model layers, increasing.
      values: of each of these layers.
      threshold: from the configuration.
      wording: of `reading`, with a place for the value.
    """

    rule: str
    layers: tuple[int, ...]
    values: tuple[float, ...]
    threshold: float
    wording: str

    @property
    def value(self) -> float:
        """The value of the layer that is furthest beyond the threshold."""
        return min(self.values) if self.rule in LOW_RULES else max(self.values)

    @property
    def reading(self) -> str:
        """What was measured, in words."""
        if math.isinf(self.value):
            return "router logits are not finite"
        return self.wording.format(self.value)

    def within(self, layers: Iterable[int]) -> "Alarm":
        """Returns the alarm restricted to some of its layers."""
        wanted = set(layers)
        kept_layers, kept_values = [], []
        for layer, value in zip(self.layers, self.values, strict=True):
            if layer in wanted:
                kept_layers.append(layer)
                kept_values.append(value)
        return dataclasses.replace(self, layers=tuple(kept_layers), values=tuple(kept_values))


def check(interval: RoutingInterval, config: Config) -> list[Alarm]:
    """Applies every rule that is switched on to every MoE layer of one logging interval.

    Args:
      interval: what was logged.
      config: of the run; thresholds are in `config.alarms`.

    Returns:
      One alarm for each rule that holds in a layer, in the order of the rules.
    """
    alarms = []
    for rule, (value_N, wording) in _measure(interval, config).items():
        threshold = float(getattr(config.alarms, rule))
        if not threshold:
            continue
        holds_N = value_N < threshold if rule in LOW_RULES else value_N > threshold
        places = np.flatnonzero(holds_N).tolist()
        if places:
            layers = tuple(config.moe_layers[place] for place in places)
            values = tuple(value_N[places].tolist())
            alarms.append(Alarm(rule, layers, values, threshold, wording))
    return alarms


def _measure(interval: RoutingInterval, config: Config) -> dict[str, tuple[np.ndarray, str]]:
    """Returns the value of each rule in each layer, [N], and the wording of its reading."""
    metrics = interval.layers
    kinds = [kind for kind in config.layers if kind is not None]
    idle_N = interval.idle_steps_NE.max(axis=1).astype(float)
    # A logit that is not finite is beyond every threshold.
    logit_N = np.where(np.isnan(metrics["logit_max"]), np.inf, metrics["logit_max"])
    return {
        "collapse": (_collapse(interval), "MaxVio is {:.0%} of what is possible"),
        "dead_experts": (idle_N, "an expert got no token for {:,.0f} steps"),
        "balance_floor": (_balance(interval), "the balance loss is {:.3f}, and 1 is its floor"),
        "logits": (logit_N, "a router logit reached {:,.1f}"),
        "ties": (metrics["ties"], "{:.2%} of tokens tie between their last expert and the next"),
        "drops": (metrics["dropped"], "{:.1%} of choices found no slot"),
        "entropy": (
            _relative_entropy(metrics["entropy"], kinds),
            "the router's entropy is {:.2%} of ln E",
        ),
    }


def _collapse(interval: RoutingInterval) -> Float[np.ndarray, "N"]:
    """Returns MaxVio over E / K - 1, its value when every token visits the same K experts.

    K is the number of experts that tokens had, which a schedule may set below `moe.top_k`. Where
    E = K, MaxVio says nothing, and the result is 0.
    """
    num_experts = interval.counts_NE.shape[1]
    has_choices_N = interval.choices_N > 0
    choices_N = np.where(has_choices_N, interval.choices_N, 1)
    largest_N = np.where(has_choices_N, num_experts / choices_N - 1, 0)
    can_collapse_N = largest_N > 1e-6
    ratio_N = interval.layers["max_violation"] / np.where(can_collapse_N, largest_N, 1)
    return np.where(can_collapse_N, ratio_N, 0.0)


def _balance(interval: RoutingInterval) -> Float[np.ndarray, "N"]:
    """Returns the balance loss of the interval as one batch, which is 1 at perfect balance."""
    counts_NE = interval.counts_NE
    num_experts = counts_NE.shape[1]
    total_N1 = counts_NE.sum(axis=1, keepdims=True)
    load_NE = counts_NE / np.maximum(total_N1, 1)
    product_N = (load_NE * interval.probs_NE).sum(axis=1)
    loss_N = num_experts * product_N
    return np.where(counts_NE.any(axis=1), loss_N, np.nan)


def _relative_entropy(
    entropy_N: Float[np.ndarray, "N"], kinds: Sequence[MoeConfig]
) -> Float[np.ndarray, "N"]:
    """Returns the router's entropy over that of a uniform one; NaN where no choice is learned."""
    uniform = []
    for kind in kinds:
        uniform.append(math.log(kind.num_choices) if kind.num_choices > 1 else math.nan)
    return entropy_N / np.array(uniform)
