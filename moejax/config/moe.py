"""The leaves of a Mixture-of-Experts layer, and which of them go together."""

import dataclasses
import difflib
from typing import Any, Literal

from moejax.config.errors import ConfigError, require


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The Mixture-of-Experts layers. `num_experts=0` is the dense control."""

    num_experts: int = 8
    top_k: int = 2  # experts per token; for expert_choice on average
    d_expert: int = 0  # hidden width of one expert; 0 derives d_ff / top_k: the active parameters of the dense twin
    num_shared_experts: int = 0  # experts of width d_expert that every token visits
    shared_combine: Literal["sum", "gated", "averaged"] = "sum"  # added; times a sigmoid of the token; mean with routed
    activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu", "clamped_swiglu"] = "swiglu"  # of experts
    activation_limit: float = 7.0  # clamped_swiglu: largest gate, and magnitude of up
    expert_bias: bool = False  # biases in the experts
    d_latent: int = 0  # width that tokens are projected to for the experts, and back from; 0: as they are
    weight_on: Literal["output", "input"] = "output"  # of the expert: where the combine weight is multiplied
    expert_dropout: float = 0.0  # training: fraction of choices whose output is dropped; the others are scaled up
    num_zero_experts: int = 0  # further choices of the router whose output is 0
    num_identity_experts: int = 0  # whose output is the token itself
    num_constant_experts: int = 0  # whose output is a learned vector
    first_dense: int = 0  # this many first layers are dense
    every: int = 1  # of the rest, every n-th layer is MoE
    per_layer: str = ""  # layers that differ, such as "0: router=hash; -1: top_k=1 renormalize=False; 2-3: dense"

    # Router
    router: str = "softmax_topk"  # one of ROUTER_RULES
    score: Literal["auto", "softmax", "softmax_after", "sigmoid", "sqrt_softplus", "uniform"] = "auto"  # of an expert
    select_by: Literal["score", "logits"] = "score"  # what the selection bias is added to
    renormalize: bool = True  # make the selected weights sum to 1, before route_scale
    route_scale: float = 1.0  # multiplies the weights
    router_bias: bool = False  # a learned bias on the logits
    jitter: float = 0.0  # training: the router sees x times a uniform draw from 1 - jitter to 1 + jitter
    router_noise: Literal["learned", "fixed"] = "learned"  # noisy_topk: of a learned scale, or of 1 / num_experts
    noise_scale: float = 1.0  # multiplies that noise
    num_groups: int = 1  # experts in groups, of which a token may visit top_k_groups
    top_k_groups: int = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    mixer_threshold: float = 0.01  # sparse_mixer: half the relative distance to the best within which experts compete
    sinkhorn_iterations: int = 8
    d_router: int = 0  # cosine: width in which tokens and experts are compared; 0 derives max(num_experts / 2, 8)
    slots_per_expert: int = 0  # soft: of a sequence; 0 derives top_k * seq_len / num_experts
    allow_noncausal: bool = False  # let a token's routing in training depend on later tokens of its sequence

    # Capacity
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.25  # dispatch="capacity": slots per expert over a perfectly balanced load
    eval_capacity_factor: float = 0.0  # the same for evaluation; 0 is dropless
    capacity_group: Literal["sequence", "device", "global"] = "sequence"  # tokens that share an expert's slots
    capacity_order: Literal["position", "choice", "weight"] = "position"  # who is served first
    overflow: Literal["drop", "next", "renormalize"] = "drop"  # what becomes of a choice without a slot
    exchange: Literal["auto", "gather", "ring", "all_to_all", "ragged", "dedup", "two_level"] = "auto"  # what travels
    exchange_buffer: float = 1.5  # rows of a buffer over their mean; what has no room takes a slower way
    exchange_chunks: int = 1  # parts of a device's tokens, so that one can travel while another is computed
    save_exchanged: bool = True  # keep what arrived for the backward pass, where else remat would send it again
    grouped_matmul: Literal["auto", "tiled", "ragged", "tokamax", "padded", "dense"] = "auto"

    # Balancing
    balance_weight: float = 0.01
    balance_scope: Literal["global", "microbatch", "device", "sequence"] = "global"  # of its means
    balance_convention: Literal["normalized", "first_choice", "times_k", "over_k"] = "normalized"  # 1 at balance, ...
    sequence_balance_weight: float = 0.0  # DeepSeek-V3's loss within each sequence
    importance_weight: float = 0.0  # Shazeer's loss on the sums of weights
    vmoe_importance_weight: float = 0.0  # V-MoE's, on the sums of all probabilities
    load_weight: float = 0.0  # Shazeer's loss on the expected load; noisy_topk
    vmoe_load_weight: float = 0.0  # V-MoE's estimate of it; noisy_topk
    z_weight: float = 1e-3
    selection_bias: bool = False  # a bias per expert that steers the selection only, updated from counts
    bias_rate: float = 1e-3  # its step
    bias_centered: bool = False  # subtract its mean after each step

    @property
    def num_choices(self) -> int:
        """Width of the router: how many experts a token can choose among, those without weights at the end."""
        return self.num_experts + self.num_free_experts

    @property
    def num_free_experts(self) -> int:
        """Experts that cost no FLOPs: zero, identity and constant ones, in this order."""
        return self.num_zero_experts + self.num_identity_experts + self.num_constant_experts

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers in the layer."""
        return self.jitter > 0 or self.expert_dropout > 0 or ROUTER_RULES[self.router].draws

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router's state holds a selection bias."""
        return self.selection_bias or self.router == "quantile"


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


def derive_moe(moe: MoeConfig, seq_len: int) -> MoeConfig:
    """Fills in what is left to be derived, apart from the experts' width.

    Raises:
      ConfigError: there is no such router.
    """
    if moe.router not in ROUTER_RULES:
        near = difflib.get_close_matches(moe.router, ROUTER_RULES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"moe.router={moe.router!r} must be one of {', '.join(ROUTER_RULES)}; the nearest is {near}")
    if moe.num_experts < 1:
        return moe
    derived: dict[str, Any] = {}
    if moe.score == "auto":
        # A single sigmoid is a weight that learns; a softmax over the one selected expert is always 1.
        derived["score"] = (
            "sigmoid" if moe.router == "sinkhorn" and moe.top_k == 1 else ROUTER_RULES[moe.router].scores[0]
        )
    if moe.router == "cosine" and moe.d_router == 0:
        derived["d_router"] = max(moe.num_experts // 2, 8)
    if moe.router == "soft" and moe.slots_per_expert == 0:
        derived["slots_per_expert"] = max(1, moe.top_k * seq_len // moe.num_experts)
    return dataclasses.replace(moe, **derived)


def validate_moe(moe: MoeConfig) -> None:
    """Raises `ConfigError` for leaves that do not go together."""
    require(
        1 <= moe.top_k <= moe.num_choices,
        f"moe.top_k={moe.top_k} must be between 1 and moe.num_experts={moe.num_experts}"
        + (f" plus {moe.num_free_experts} zero, identity and constant experts" if moe.num_free_experts else ""),
    )
    _validate_experts(moe)
    _validate_router(moe)
    _validate_groups(moe)
    _validate_capacity(moe)
    _validate_balancing(moe)
    _validate_exchange(moe)


def _validate_experts(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    require(
        moe.shared_combine == "sum" or moe.num_shared_experts > 0,
        f"moe.shared_combine={moe.shared_combine} needs shared experts: moe.num_shared_experts=0 must be above 0",
    )
    for key in ("num_zero_experts", "num_identity_experts", "num_constant_experts"):
        value = getattr(moe, key)
        require(
            value == 0 or (rules.takes_capacity and moe.router != "hierarchical" and moe.num_groups == 1),
            f"moe.{key}={value} adds choices for tokens outside any group of experts, which moe.router={moe.router} "
            f"with moe.num_groups={moe.num_groups} does not offer; set 0",
        )
    require(
        moe.weight_on == "output" or (rules.takes_capacity and moe.num_constant_experts == 0),
        "moe.weight_on=input: where experts choose tokens or outputs are constant (moe.router="
        f"{moe.router}, moe.num_constant_experts={moe.num_constant_experts}) no input takes the weight; use output",
    )
    require(
        moe.expert_dropout == 0 or rules.takes_capacity,
        f"moe.expert_dropout={moe.expert_dropout} drops choices of tokens, and with moe.router={moe.router} tokens do "
        "not choose; set 0",
    )


def _validate_router(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    require(
        moe.router != "switch" or moe.top_k == 1,
        f"moe.router=switch sends a token to one expert, so moe.top_k={moe.top_k} must be 1; or use softmax_topk",
    )
    require(
        moe.score in rules.scores,
        f"moe.score={moe.score} does not go with moe.router={moe.router}; use one of {', '.join(rules.scores)}",
    )
    selects = moe.score != "uniform" and rules.takes_capacity and moe.router != "sparse_mixer"
    require(
        not (selects and moe.top_k == 1 and moe.score == "softmax_after"),
        "moe.score=softmax_after with moe.top_k=1 makes every weight 1 and the task gradient of the router 0; "
        "use moe.score=softmax or sigmoid with moe.renormalize=False",
    )
    require(
        not (selects and moe.top_k == 1 and moe.renormalize),
        "moe.renormalize=True with moe.top_k=1 makes every weight 1 and the task gradient of the router 0; "
        "set moe.renormalize=False",
    )
    require(
        moe.score != "softmax_after" or moe.renormalize,
        "moe.renormalize=False with moe.score=softmax_after: a softmax over the selected sums to 1 in any case; "
        "set moe.renormalize=True, or moe.score=softmax",
    )
    require(
        not moe.selection_bias or rules.takes_bias,
        f"moe.selection_bias=True does not go with moe.router={moe.router}; use one of {_routers('takes_bias')}",
    )
    require(
        moe.router != "quantile" or moe.top_k < moe.num_choices,
        f"moe.router=quantile compares with the expert behind the last chosen one, so moe.top_k={moe.top_k} must be "
        f"below moe.num_experts={moe.num_choices}",
    )
    require(
        moe.router != "dense" or moe.top_k == moe.num_choices,
        f"moe.router=dense sends a token to every expert, so moe.top_k={moe.top_k} must be {moe.num_choices}",
    )
    require(
        rules.is_causal or moe.allow_noncausal,
        f"moe.router={moe.router} lets the routing of a token depend on later tokens of its sequence, which a causal "
        "model would exploit; set moe.allow_noncausal=True to try it all the same",
    )
    require(
        moe.jitter == 0 or moe.score != "uniform",
        f"moe.jitter={moe.jitter}: moe.router={moe.router} with moe.score=uniform does not look at the token; set 0",
    )
    require(
        moe.router_noise == "learned" or moe.router == "noisy_topk",
        f"moe.router_noise={moe.router_noise} is for moe.router=noisy_topk, not {moe.router}; set learned",
    )
    require(
        moe.route_scale == 1 or moe.router != "soft",
        f"moe.route_scale={moe.route_scale}: the weights of moe.router=soft sum to 1 over slots; set 1",
    )
    require(
        not moe.router_bias or (moe.score != "uniform" and moe.router not in ("cosine", "soft")),
        f"moe.router_bias=True: moe.router={moe.router} with moe.score={moe.score} has no linear logits to add it to",
    )


def _validate_groups(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    if moe.num_groups == 1:
        require(
            moe.router != "hierarchical",
            "moe.router=hierarchical chooses among groups, so moe.num_groups=1 must be at least 2",
        )
        require(moe.top_k_groups == 1, f"moe.top_k_groups={moe.top_k_groups} must be at most moe.num_groups=1")
        return
    require(
        rules.takes_groups or moe.router == "hierarchical",
        f"moe.num_groups={moe.num_groups} does not go with moe.router={moe.router}; use one of "
        f"{_routers('takes_groups')}, hierarchical",
    )
    require(
        moe.num_experts % moe.num_groups == 0,
        f"moe.num_experts={moe.num_experts} must be a multiple of moe.num_groups={moe.num_groups}",
    )
    require(
        1 <= moe.top_k_groups <= moe.num_groups,
        f"moe.top_k_groups={moe.top_k_groups} must be between 1 and moe.num_groups={moe.num_groups}",
    )
    size = moe.num_experts // moe.num_groups
    require(
        moe.top_k <= moe.top_k_groups * size,
        f"moe.top_k={moe.top_k} must be at most the {moe.top_k_groups * size} experts of moe.top_k_groups="
        f"{moe.top_k_groups} groups; raise moe.top_k_groups",
    )
    if moe.router == "hierarchical":
        require(
            moe.top_k_groups >= 2 and moe.top_k % moe.top_k_groups == 0 and moe.top_k >= 2 * moe.top_k_groups,
            f"moe.router=hierarchical chooses moe.top_k_groups={moe.top_k_groups} groups and as many experts in each, "
            f"at least 2 of both, or the weight is 1 and its router learns nothing: moe.top_k={moe.top_k} must be a "
            "multiple of moe.top_k_groups, such as 4 with 2",
        )
    else:
        require(
            moe.group_score != "top2_sum" or size >= 2,
            f"moe.group_score=top2_sum needs groups of at least 2 experts, not {size}; use max",
        )


def _validate_capacity(moe: MoeConfig) -> None:
    rules = ROUTER_RULES[moe.router]
    for key in ("capacity_factor", "eval_capacity_factor"):
        value = getattr(moe, key)
        require(
            moe.dispatch != "capacity" or 0 < value <= moe.num_experts or (value == 0 and key.startswith("eval")),
            f"moe.{key}={value} must be above 0 and at most moe.num_experts={moe.num_experts}, "
            "where one expert could take every token",
        )
    require(
        moe.dispatch == "capacity" or moe.eval_capacity_factor == 0,
        f"moe.eval_capacity_factor={moe.eval_capacity_factor} needs moe.dispatch=capacity, not {moe.dispatch}; set 0 "
        "for evaluation without dropping",
    )
    require(
        moe.dispatch != "capacity" or rules.takes_capacity,
        f"moe.dispatch=capacity: with moe.router={moe.router} experts choose, and none can overflow; use dropless",
    )
    require(
        moe.dispatch == "dropless" or moe.capacity_order == "position" or moe.allow_noncausal,
        f"moe.capacity_order={moe.capacity_order} serves some choices of later tokens first, which a causal model "
        "would exploit; use position, or set moe.allow_noncausal=True to try it all the same",
    )
    require(
        moe.overflow != "next" or (moe.score != "uniform" and moe.router not in ("sparse_mixer", "hierarchical")),
        f"moe.overflow=next needs a ranking of all experts, which moe.router={moe.router} does not give; use drop",
    )
    require(
        moe.overflow != "renormalize" or moe.top_k > 1,
        "moe.overflow=renormalize spreads the weight of a dropped choice over the others, and moe.top_k=1 has none; "
        "use drop or next",
    )


def _validate_exchange(moe: MoeConfig) -> None:
    require(
        moe.exchange in ("auto", "gather", "ring") or moe.router not in ("expert_choice", "soft"),
        f"moe.exchange={moe.exchange} sends tokens to the experts they chose, and with moe.router={moe.router} they "
        "choose none; use auto or ring",
    )
    require(
        moe.exchange_chunks > 0,
        f"moe.exchange_chunks={moe.exchange_chunks} must be at least 1: parts of a device's tokens",
    )
    require(
        moe.exchange_buffer > 0,
        f"moe.exchange_buffer={moe.exchange_buffer} must be above 0, such as 1.5: rows of a buffer over their mean",
    )


def _validate_balancing(moe: MoeConfig) -> None:
    for key in ("load_weight", "vmoe_load_weight"):
        value = getattr(moe, key)
        require(
            value == 0 or (moe.router == "noisy_topk" and moe.top_k < moe.num_choices),
            f"moe.{key}={value} estimates the load from routing noise: it needs moe.router=noisy_topk, not "
            f"{moe.router}, and moe.top_k={moe.top_k} below moe.num_experts={moe.num_choices}",
        )
        require(
            value == 0 or (moe.noise_scale > 0 and not moe.selection_bias and moe.num_groups == 1),
            f"moe.{key}={value} estimates the load of plain noisy top-k: it needs moe.noise_scale={moe.noise_scale} "
            f"above 0, moe.selection_bias={moe.selection_bias} False and moe.num_groups={moe.num_groups} to be 1",
        )
    for key, off in (
        ("sequence_balance_weight", 0.0),
        ("importance_weight", 0.0),
        ("vmoe_importance_weight", 0.0),
        ("balance_scope", "global"),
        ("balance_convention", "normalized"),
    ):
        value = getattr(moe, key)
        require(
            value == off or ROUTER_RULES[moe.router].takes_capacity,
            f"moe.{key}={value} is for routers in which tokens choose experts, not moe.router={moe.router}; set {off}",
        )


def _routers(attribute: str) -> str:
    return ", ".join(name for name, rules in ROUTER_RULES.items() if getattr(rules, attribute))
