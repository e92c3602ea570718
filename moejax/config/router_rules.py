"""The routers by name, and what goes together with each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RouterRules:
    """A router, and what goes together with it.

    Attributes:
      scores: score functions it can use; "auto" takes the first.
      takes_groups: whether its selection can be limited to groups.
      takes_bias: whether its selection can carry a selection bias.
      takes_capacity: whether tokens choose, so that an expert can overflow.
      is_causal: whether a token's routing is independent of later tokens, in training too.
      draws: whether it draws random numbers in training.
      can_limit: whether `schedule.top_k` can lower the number of experts per token, because the
        weights follow from the selection alone.
      is_fixed: whether the selection does not depend on logits.
    """

    scores: tuple[str, ...]
    takes_groups: bool = False
    takes_bias: bool = False
    takes_capacity: bool = True
    is_causal: bool = True
    draws: bool = False
    can_limit: bool = True
    is_fixed: bool = False


ANY = ("softmax", "softmax_after", "sigmoid", "sqrt_softplus")
AFTER = ("softmax_after", "softmax", "sigmoid", "sqrt_softplus")
BOTH = {"takes_groups": True, "takes_bias": True}
NO_CHOICE = {"takes_capacity": False, "is_causal": False, "can_limit": False}

ROUTER_RULES = {
    "softmax_topk": RouterRules(("softmax", "softmax_after"), **BOTH),
    "switch": RouterRules(("softmax",), **BOTH),
    "noisy_topk": RouterRules(AFTER, draws=True, **BOTH),
    "sigmoid_topk": RouterRules(("sigmoid", "sqrt_softplus"), **BOTH),
    "cosine": RouterRules(ANY, **BOTH),
    "sparse_mixer": RouterRules(("softmax",), draws=True, can_limit=False),
    "sinkhorn": RouterRules(AFTER, is_causal=False),
    "quantile": RouterRules(ANY, can_limit=False),
    "hierarchical": RouterRules(("softmax_after",), draws=True, can_limit=False),
    "hash": RouterRules(("uniform", *ANY), is_fixed=True),
    "random": RouterRules(("uniform",), draws=True, is_fixed=True),
    "balanced": RouterRules(("uniform",), is_fixed=True),
    "expert_choice": RouterRules(("softmax",), **NO_CHOICE),
    "soft": RouterRules(("softmax",), **NO_CHOICE),
    "dense": RouterRules(("softmax",), can_limit=False),
}
"""The routers, one line each; their functions are in `moejax/moe/router/__init__.py`."""
