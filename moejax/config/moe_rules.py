"""Leaves of a Mixture-of-Experts layer that do not go together."""

from moejax.config.errors import require
from moejax.config.loss_specs import LossSpec
from moejax.config.router_rules import ROUTER_RULES
from moejax.config.sections.moe import MoeConfig

OFF_WHERE_EXPERTS_CHOOSE = {
    "balance_scope": "global",
    "balance_convention": "normalized",
}
"""Leaves that are for routers in which tokens choose experts, and the value they need in others."""


def validate_moe(moe: MoeConfig) -> None:
    """Raises `ConfigError` for leaves that do not go together."""
    _validate_top_k(moe)
    _validate_experts(moe)
    _validate_score(moe)
    _validate_router(moe)
    _validate_groups(moe)
    _validate_capacity(moe)
    _validate_overflow(moe)
    _validate_balancing(moe)
    _validate_exchange(moe)


def _validate_top_k(moe: MoeConfig) -> None:
    limit = f"moe.num_experts={moe.num_experts}"
    if moe.num_zero_computation_experts:
        limit += f" plus {moe.num_zero_computation_experts} zero, identity and constant experts"
    require(
        1 <= moe.top_k <= moe.num_choices,
        f"moe.top_k={moe.top_k} must be between 1 and {limit}",
    )


def _validate_experts(moe: MoeConfig) -> None:
    tokens_choose = ROUTER_RULES[moe.router].takes_capacity
    is_ungrouped = moe.router != "hierarchical" and moe.num_groups == 1
    for key in ("num_zero_experts", "num_identity_experts", "num_constant_experts"):
        value = getattr(moe, key)
        require(
            value == 0 or (tokens_choose and is_ungrouped),
            f"moe.{key}={value} adds choices for tokens outside any group of experts, which "
            f"moe.router={moe.router} with moe.num_groups={moe.num_groups} does not offer; set 0",
        )
    require(
        moe.weight_on == "output" or (tokens_choose and moe.num_constant_experts == 0),
        "moe.weight_on=input: where experts choose tokens or outputs are constant "
        f"(moe.router={moe.router}, moe.num_constant_experts={moe.num_constant_experts}) "
        "no input takes the weight; use output",
    )


def _validate_score(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    require(
        moe.router != "switch" or moe.top_k == 1,
        f"moe.router=switch sends a token to one expert, so moe.top_k={moe.top_k} must be 1; "
        "or use softmax_topk",
    )
    require(
        moe.score in rules.scores,
        f"moe.score={moe.score} does not go with moe.router={moe.router}; "
        f"use one of {', '.join(rules.scores)}",
    )
    # A single weight that is normalised over the selected experts is 1, whatever the logits.
    selects = moe.score != "uniform" and rules.takes_capacity and moe.router != "sparse_mixer"
    selects_one = selects and moe.top_k == 1
    require(
        not (selects_one and moe.score == "softmax_after"),
        "moe.score=softmax_after with moe.top_k=1 makes every weight 1 and the task gradient of "
        "the router 0; use moe.score=softmax or sigmoid with moe.renormalize=False",
    )
    require(
        not (selects_one and moe.renormalize),
        "moe.renormalize=True with moe.top_k=1 makes every weight 1 and the task gradient of the "
        "router 0; set moe.renormalize=False",
    )
    require(
        moe.score != "softmax_after" or moe.renormalize,
        "moe.renormalize=False with moe.score=softmax_after: a softmax over the selected experts "
        "sums to 1 in any case; set moe.renormalize=True, or moe.score=softmax",
    )


def _validate_router(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    require(
        not moe.selection_bias or rules.takes_bias,
        f"moe.selection_bias=True does not go with moe.router={moe.router}; "
        f"use one of {_routers('takes_bias')}",
    )
    require(
        moe.router != "quantile" or moe.top_k < moe.num_choices,
        "moe.router=quantile compares with the expert that ranks after the last chosen one, so "
        f"moe.top_k={moe.top_k} must be below moe.num_experts={moe.num_choices}",
    )
    require(
        moe.router != "dense" or moe.top_k == moe.num_choices,
        f"moe.router=dense sends a token to every expert, so moe.top_k={moe.top_k} must be "
        f"{moe.num_choices}",
    )
    require(
        rules.is_causal or moe.allow_noncausal,
        f"moe.router={moe.router} lets the routing of a token depend on later tokens of its "
        "sequence, which a causal model would exploit; set moe.allow_noncausal=True to try it "
        "anyway",
    )
    has_linear_logits = moe.score != "uniform" and moe.router not in ("cosine", "soft")
    require(
        not moe.router_bias or has_linear_logits,
        f"moe.router_bias=True: moe.router={moe.router} with moe.score={moe.score} has no linear "
        "logits to add it to",
    )


def _validate_groups(moe: MoeConfig) -> None:
    if moe.num_groups == 1:
        require(
            moe.router != "hierarchical",
            "moe.router=hierarchical chooses among groups, so moe.num_groups=1 must be at least 2",
        )
        require(
            moe.top_k_groups == 1,
            f"moe.top_k_groups={moe.top_k_groups} must be at most moe.num_groups=1",
        )
        return
    require(
        ROUTER_RULES[moe.router].takes_groups or moe.router == "hierarchical",
        f"moe.num_groups={moe.num_groups} does not go with moe.router={moe.router}; use one of "
        f"{_routers('takes_groups')}, hierarchical",
    )
    require(
        moe.num_experts % moe.num_groups == 0,
        f"moe.num_experts={moe.num_experts} must be a multiple of moe.num_groups={moe.num_groups}",
    )
    require(
        1 <= moe.top_k_groups <= moe.num_groups,
        f"moe.top_k_groups={moe.top_k_groups} must be between 1 and "
        f"moe.num_groups={moe.num_groups}",
    )
    _validate_group_size(moe)


def _validate_group_size(moe: MoeConfig) -> None:
    group_size = moe.num_experts // moe.num_groups
    open_experts = moe.top_k_groups * group_size
    require(
        moe.top_k <= open_experts,
        f"moe.top_k={moe.top_k} must be at most the {open_experts} experts of "
        f"moe.top_k_groups={moe.top_k_groups} groups; raise moe.top_k_groups",
    )
    if moe.router == "hierarchical":
        is_multiple = moe.top_k % moe.top_k_groups == 0
        has_two_of_both = moe.top_k_groups >= 2 and moe.top_k >= 2 * moe.top_k_groups
        require(
            is_multiple and has_two_of_both,
            f"moe.router=hierarchical chooses moe.top_k_groups={moe.top_k_groups} groups and an "
            "equal number of experts in each, at least 2 of both, or the weight is 1 and its "
            f"router learns nothing: moe.top_k={moe.top_k} must be a multiple of "
            "moe.top_k_groups, such as 4 with 2",
        )
    else:
        require(
            moe.group_score != "top2_sum" or group_size >= 2,
            f"moe.group_score=top2_sum needs groups of at least 2 experts, not {group_size}; "
            "use max",
        )


def _validate_capacity(moe: MoeConfig) -> None:
    if moe.dispatch == "dropless":
        return
    for key in ("capacity_factor", "eval_capacity_factor"):
        value = getattr(moe, key)
        is_dropless_evaluation = key == "eval_capacity_factor" and value == 0
        require(
            is_dropless_evaluation or 0 < value <= moe.num_experts,
            f"moe.{key}={value} must be above 0 and at most moe.num_experts={moe.num_experts}, "
            "where one expert could take every token",
        )
    require(
        ROUTER_RULES[moe.router].takes_capacity,
        f"moe.dispatch=capacity: with moe.router={moe.router} experts choose, and none can "
        "overflow; use dropless",
    )
    require(
        moe.capacity_order == "position" or moe.allow_noncausal,
        f"moe.capacity_order={moe.capacity_order} gives slots to some choices of later tokens "
        "first, which a causal model would exploit; use position, or set "
        "moe.allow_noncausal=True to try it anyway",
    )


def _validate_overflow(moe: MoeConfig) -> None:
    ranks_all = moe.score != "uniform" and moe.router not in ("sparse_mixer", "hierarchical")
    require(
        moe.overflow != "next" or ranks_all,
        f"moe.overflow=next needs a ranking of all experts, which moe.router={moe.router} does "
        "not give; use drop",
    )
    require(
        moe.overflow != "renormalize" or moe.top_k > 1,
        "moe.overflow=renormalize spreads the weight of a dropped choice over the others, and "
        "moe.top_k=1 has none; use drop or next",
    )


def _validate_balancing(moe: MoeConfig) -> None:
    for name, spec in moe.weighted_losses.items():
        _validate_loss(moe, name, spec)
    tokens_choose = ROUTER_RULES[moe.router].takes_capacity
    for key, off in OFF_WHERE_EXPERTS_CHOOSE.items():
        value = getattr(moe, key)
        require(
            value == off or tokens_choose,
            f"moe.{key}={value} is for routers in which tokens choose experts, not "
            f"moe.router={moe.router}; set {off}",
        )


def _validate_loss(moe: MoeConfig, name: str, spec: LossSpec) -> None:
    weight = getattr(moe, f"{name}_weight")
    given = f"moe.{name}_weight={weight}"
    require(
        moe.router in spec.fitting_routers,
        f"{given} does not go with moe.router={moe.router}; set 0, or use one of "
        f"{', '.join(spec.fitting_routers)}",
    )
    if spec.estimates_load:
        _validate_load_loss(moe, given)


def _validate_load_loss(moe: MoeConfig, given: str) -> None:
    require(
        moe.top_k < moe.num_choices,
        f"{given} estimates the load from routing noise: it needs moe.top_k={moe.top_k} below "
        f"moe.num_experts={moe.num_choices}",
    )
    is_plain = not moe.selection_bias and moe.num_groups == 1
    require(
        moe.noise_scale > 0 and is_plain,
        f"{given} estimates the load of plain noisy top-k: it needs "
        f"moe.noise_scale={moe.noise_scale} above 0, moe.selection_bias={moe.selection_bias} "
        f"False and moe.num_groups={moe.num_groups} to be 1",
    )


def _validate_exchange(moe: MoeConfig) -> None:
    sends_choices = moe.exchange not in ("auto", "gather", "ring")
    require(
        not sends_choices or moe.router not in ("expert_choice", "soft"),
        f"moe.exchange={moe.exchange} sends tokens to the experts they chose, and with "
        f"moe.router={moe.router} they choose none; use auto or ring",
    )


def _routers(attribute: str) -> str:
    """Returns the names of the routers that have a property."""
    names = [name for name, rules in ROUTER_RULES.items() if getattr(rules, attribute)]
    return ", ".join(names)
