"""The parametrisation of `mup`: what becomes of multipliers and learning rates in a larger model.

With m the ratio of the width to that of the base, L likewise of the depth and K of the experts per
token, against the usual parametrisation:

  embeddings       entries and multiplier as in the base, whatever the width
  logits           divided by m
  a layer's part   divided by L before it is added to the residual
  routed experts   output times sqrt(K), rate divided by sqrt(K)
  matrices         rate divided by the ratio of their input width, decay multiplied by it

The rates are those of Adam and Lion, whose updates have entries of a given size. Muon's have
singular values of a given size over the root of the larger side, so that the ratio enters by its
root; those of MuonH are relative to the weights and stay. Vectors and embeddings keep their rate.

Sources: Yang et al. 2022 (Tensor Programs V, tables 3 and 8) for widths, with the router as a map
to outputs of a number that does not grow (Malasnicki et al. 2025); Dey et al. 2025 (CompleteP,
alpha 1) for depth, without its change of Adam's epsilon; Yang, Simon and Bernstein 2023 for Muon.
The factor of experts per token is ours: with weights of 1/K, K different outputs add up to
1/sqrt(K) of one, and updates that agree to all of one, so that a factor on the output and its
inverse on the rate keep both. The number of experts changes nothing: Adam's updates do not depend
on how often an expert is chosen.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from moejax.config.parameter_groups import kind_of
from moejax.config.sections.moe import MoeConfig
from moejax.config.sections.root import Config

BY_MUON_ROOT = ("muon",)
KEEPS_RATE = ("muonh",)


def folded(config: Config) -> Config:
    """Returns the same model in the usual parametrisation: its multipliers are leaves.

    It computes the same function of the same weights. It is not trained the same.
    """
    if not config.mup.base_width:
        return config
    model, mup = config.model, config.mup
    depth = model.num_layers / mup.base_depth if mup.base_depth else 1.0
    folded_model = dataclasses.replace(
        model,
        embedding_multiplier=model.embedding_multiplier or math.sqrt(mup.base_width),
        logits_divisor=model.logits_divisor * width_ratio(config),
        residual_multiplier=model.residual_multiplier / depth,
    )
    return dataclasses.replace(
        config,
        model=folded_model,
        moe=folded_moe(config, config.moe),
        mup=type(mup)(),
    )


def folded_moe(config: Config, moe: MoeConfig) -> MoeConfig:
    """Returns a kind of MoE layer with the factor on its output in `moe.route_scale`."""
    return dataclasses.replace(moe, route_scale=moe.route_scale * _expert_factor(config, moe.top_k))


def embedding_deviation(config: Config) -> float:
    """Returns the standard deviation of the initial embeddings."""
    return float((config.mup.base_width or config.model.d_model) ** -0.5)


def width_ratio(config: Config) -> float:
    """Returns the width over that of the base; 1 without a base."""
    return config.model.d_model / config.mup.base_width if config.mup.base_width else 1.0


def _expert_factor(config: Config, top_k: int) -> float:
    if not config.mup.base_width or not config.mup.base_top_k:
        return 1.0
    return math.sqrt(top_k / config.mup.base_top_k)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Factors of learning rates of a model over its base.

    Attributes:
      width: ratio of the widths.
      dense: ratio of the hidden widths of dense layers.
      expert: ratio of the hidden widths of experts.
      top_k: square root of the ratio of experts per token.
    """

    width: float = 1.0
    dense: float = 1.0
    expert: float = 1.0
    top_k: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> "Transfer":
        """Returns the factors of a configuration; all 1 without a base."""
        mup = config.mup
        if not mup.base_width:
            return cls()
        width = width_ratio(config)
        return cls(
            width=width,
            dense=config.model.d_ff / mup.base_d_ff if mup.base_d_ff else width,
            expert=config.moe.d_expert / mup.base_d_expert if mup.base_d_expert else width,
            top_k=_expert_factor(config, config.moe.top_k),
        )

    def divisor(self, path: str, own_axes: Sequence[Any], optimizer: str) -> float:
        """Returns what the learning rate of a parameter is divided by, and its decay multiplied.

        Args:
          path: of the parameter.
          own_axes: logical axes of one of its matrices or vectors, the input side first.
          optimizer: the name of the rule by which it is trained: that of Adam for what Adam trains
            beside Muon.
        """
        kind = kind_of(path)
        if kind in ("embedding", "norm") or len(own_axes) < 2:
            return 1.0
        fan_in = self.width
        if own_axes[0] == "mlp":
            fan_in = self.expert if kind in ("experts", "shared") else self.dense
        top_k = self.top_k if kind == "experts" else 1.0
        if optimizer in KEEPS_RATE:
            return top_k
        if optimizer in BY_MUON_ROOT:
            return math.sqrt(fan_in) * top_k
        return fan_in * top_k
