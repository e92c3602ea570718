"""The routers by name, and what goes together with each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RouterRules:
    """A router, and what goes together with it.

    Attributes:
      function: "file.function" in `moejax/moe/routers`; routers in which experts choose have signatures of their own.
      scores: score functions it can use; the first is meant by "auto".
      takes_groups: whether its selection can be limited to groups.
      takes_bias: whether its selection can carry a selection bias.
      takes_capacity: whether tokens choose, so that an expert can overflow.
      is_causal: whether a token's routing is independent of later tokens, in training too.
      draws: whether it draws random numbers in training.
      can_limit: whether a token can do with fewer than `moe.top_k` experts: weights follow from the selection alone.
    """

    function: str
    scores: tuple[str, ...]
    takes_groups: bool = False
    takes_bias: bool = False
    takes_capacity: bool = True
    is_causal: bool = True
    draws: bool = False
    can_limit: bool = True

    @property
    def is_fixed(self) -> bool:
        """Whether the selection follows from no logits."""
        return self.function.startswith("fixed.")


ANY = ("softmax", "softmax_after", "sigmoid", "sqrt_softplus")
AFTER = ("softmax_after", "softmax", "sigmoid", "sqrt_softplus")
BOTH = {"takes_groups": True, "takes_bias": True}
NO_CHOICE = {"takes_capacity": False, "is_causal": False, "can_limit": False}

ROUTER_RULES = {
    "softmax_topk": RouterRules("scored.route_scored", ("softmax", "softmax_after"), **BOTH),
    "switch": RouterRules("scored.route_scored", ("softmax",), **BOTH),
    "noisy_topk": RouterRules("scored.route_noisy", AFTER, draws=True, **BOTH),
    "sigmoid_topk": RouterRules("scored.route_scored", ("sigmoid", "sqrt_softplus"), **BOTH),
    "cosine": RouterRules("scored.route_scored", ANY, **BOTH),
    "sparse_mixer": RouterRules("sparse_mixer.route_sparse_mixer", ("softmax",), draws=True, can_limit=False),
    "sinkhorn": RouterRules("sinkhorn.route_sinkhorn", AFTER, is_causal=False),
    "quantile": RouterRules("scored.route_quantile", ANY, can_limit=False),
    "hierarchical": RouterRules("hierarchical.route_hierarchical", ("softmax_after",), draws=True, can_limit=False),
    "hash": RouterRules("fixed.route_hash", ("uniform", *ANY)),
    "random": RouterRules("fixed.route_random", ("uniform",), draws=True),
    "balanced": RouterRules("fixed.route_balanced", ("uniform",)),
    "expert_choice": RouterRules("experts_choose.route_expert_choice", ("softmax",), **NO_CHOICE),
    "soft": RouterRules("experts_choose.route_soft", ("softmax",), **NO_CHOICE),
    "dense": RouterRules("scored.route_scored", ("softmax",), can_limit=False),
}
"""The routers, one line each."""
