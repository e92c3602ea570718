"""The leaves of a Mixture-of-Experts layer: what each means, its range, and what reads it."""

import dataclasses
from typing import Any, Literal

from moejax.config.loss_specs import LOSS_SPECS, LossSpec, with_loss_weights
from moejax.config.router_rules import ROUTER_RULES
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import Derived, Need, all_of, any_of, other_than, value

TOKENS_CHOOSE = other_than("moe.router", "expert_choice", "soft")
IS_SCORED = other_than("moe.score", "uniform")
HAS_CAPACITY = value("moe.dispatch", "capacity")
HAS_GROUPS = other_than("moe.num_groups", 1)
HAS_BIAS = value("moe.selection_bias", True)
HAS_ROUTING_NOISE = value("moe.router", "noisy_topk")
DERIVES_FROM_TOP_K = any_of(
    other_than("moe.router", "soft"), Derived("moe.slots_per_expert"), Derived("moe.d_expert")
)
SELECTS_BY_SCORE = value(
    "moe.router", "softmax_topk", "switch", "noisy_topk", "sigmoid_topk", "cosine"
)
CAN_SELECT_BY_LOGITS = all_of(
    SELECTS_BY_SCORE, other_than("moe.score", "softmax_after"), any_of(HAS_BIAS, HAS_GROUPS)
)
CAN_RENORMALIZE = all_of(
    IS_SCORED,
    other_than("moe.router", "sparse_mixer", "hierarchical", "expert_choice", "soft"),
)
EXPERTS_ARE_SPLIT = any_of(other_than("mesh.expert", 1), other_than("mesh.dcn_expert", 1))
SENDS_CHOICES = all_of(
    EXPERTS_ARE_SPLIT, other_than("moe.exchange", "gather", "ring"), TOKENS_CHOOSE
)

ROUTER_ALIASES = {
    "topk": "softmax_topk",
    "top_k": "softmax_topk",
    "top-k": "softmax_topk",
    "softmax": "softmax_topk",
    "mixtral": "softmax_topk",
    "sigmoid": "sigmoid_topk",
    "deepseek": "sigmoid_topk",
    "noisy": "noisy_topk",
    "base": "sinkhorn",
    "grin": "sparse_mixer",
    "ec": "expert_choice",
}
"""Other names that people use for the routers."""


def _capacity(default: Any, meaning: str, **declared: Any) -> Any:
    return leaf(default, meaning, needs=HAS_CAPACITY, **declared)


def _num_zero_computation(output: str) -> Any:
    return leaf(0, f"additional choices of the router whose output is {output}", at_least=0)


def _weight(name: str, spec: LossSpec) -> Any:
    """Returns the leaf of the weight of a loss."""
    needs = _one_of(spec.fitting_routers)
    return leaf(spec.default, f"weight of {spec.meaning}", at_least=0, needs=needs)


def _one_of(routers: tuple[str, ...]) -> Need | None:
    """Returns the need for one of these routers, in few words; None if any will do."""
    others = [name for name in ROUTER_RULES if name not in routers]
    if not others:
        return None
    if len(others) < len(routers):
        return other_than("moe.router", *others)
    return value("moe.router", *routers)


@dataclasses.dataclass(frozen=True)
@with_loss_weights(float, _weight)
class MoeConfig:
    """The Mixture-of-Experts layers. `num_experts=0` is the dense control.

    Every auxiliary loss of `LOSS_SPECS` adds the leaf of its weight, such as `balance_weight`.
    """

    # Experts
    num_experts: int = leaf(8, "experts of a layer; 0 makes every layer dense", at_least=0)
    top_k: int = leaf(
        2,
        "experts per token; with expert_choice on average",
        at_least=1,
        needs=DERIVES_FROM_TOP_K,
    )
    d_expert: int = leaf(
        0,
        "hidden width of one expert; 0 derives d_ff / top_k: the active parameters of the dense "
        "twin",
        at_least=0,
    )
    num_shared_experts: int = leaf(
        0, "experts of width d_expert that every token visits", at_least=0
    )
    d_shared: int = leaf(
        0,
        "hidden width of all shared experts together; 0: that of num_shared_experts of them",
        at_least=0,
        needs=other_than("moe.num_shared_experts", 0),
    )
    shared_bias: bool = leaf(
        False,
        "biases of shared experts alone; expert_bias gives them to all experts",
        needs=all_of(other_than("moe.num_shared_experts", 0), value("moe.expert_bias", False)),
    )
    shared_combine: Literal["sum", "gated", "averaged"] = leaf(
        "sum",
        "how shared experts join the routed output: added, added after a sigmoid gate of the "
        "token, or averaged with it",
        needs=other_than("moe.num_shared_experts", 0),
    )
    activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu", "clamped_swiglu"] = leaf(
        "swiglu", "activation of the experts"
    )
    activation_limit: float = leaf(
        7.0,
        "largest gate, and largest magnitude of the other factor",
        at_least=1e-6,
        at_most=1e6,
        needs=value("moe.activation", "clamped_swiglu"),
    )
    expert_bias: bool = leaf(False, "biases in the experts")
    output_bias: bool = leaf(False, "a bias of the layer's output")
    d_latent: int = leaf(
        0,
        "width of the latent space of the experts: tokens are projected down to it and back up; 0: "
        "no projection",
        at_least=0,
    )
    weight_on: Literal["output", "input"] = leaf(
        "output",
        "whether the combine weight multiplies the expert's output or its input",
        needs=TOKENS_CHOOSE,
    )
    expert_dropout: float = leaf(
        0.0,
        "in training, fraction of choices whose output is dropped; the others are scaled up",
        at_least=0,
        at_most=0.99,
        needs=TOKENS_CHOOSE,
    )
    num_zero_experts: int = _num_zero_computation("0")
    num_identity_experts: int = _num_zero_computation("the token itself")
    num_constant_experts: int = _num_zero_computation("a learned vector")

    # Which layers
    first_dense: int = leaf(0, "number of dense layers before the pattern starts", at_least=0)
    every: int = leaf(1, "after first_dense, every n-th layer is a MoE layer", at_least=1)
    per_layer: str = leaf(
        "",
        'layers that differ, such as "0: router=hash; -1: top_k=1 renormalize=False; 2-3: dense"',
    )

    # Router
    router: str = leaf(
        "softmax_topk", "how experts are chosen", choices=ROUTER_RULES, aliases=ROUTER_ALIASES
    )
    score: Literal["auto", "softmax", "softmax_after", "sigmoid", "sqrt_softplus", "uniform"] = (
        leaf("auto", "score of an expert from its logit; auto takes that of the router")
    )
    select_by: Literal["score", "logits"] = leaf(
        "score",
        "what the selection bias is added to, and what groups are ranked by",
        needs=CAN_SELECT_BY_LOGITS,
    )
    renormalize: bool = leaf(
        True,
        "make the selected weights sum to 1 (see weight_norm), before route_scale",
        needs=CAN_RENORMALIZE,
    )
    weight_norm: float = leaf(
        1.0,
        "p of the p-norm of the selected weights that they are divided by: 1 is their sum, 2 the "
        "root of the sum of their squares",
        above=0,
        at_most=1000,
        needs=all_of(CAN_RENORMALIZE, value("moe.renormalize", True)),
    )
    renormalize_floor: float = leaf(
        0.0,
        "the least sum of selected scores that they are divided by",
        at_least=0,
        at_most=1,
        needs=all_of(
            CAN_RENORMALIZE,
            value("moe.renormalize", True),
            other_than("moe.score", "softmax_after"),
        ),
    )
    route_scale: float = leaf(
        1.0,
        "factor on the combine weights",
        at_least=1e-6,
        at_most=1e6,
        needs=other_than("moe.router", "soft"),
    )
    router_bias: bool = leaf(
        False,
        "a learned bias on the logits",
        needs=all_of(IS_SCORED, other_than("moe.router", "cosine", "soft")),
    )
    jitter: float = leaf(
        0.0,
        "in training, the router's input is multiplied by uniform draws from 1 - jitter to 1 + "
        "jitter",
        at_least=0,
        at_most=0.99,
        needs=IS_SCORED,
    )
    router_noise: Literal["learned", "fixed"] = leaf(
        "learned",
        "scale of the noise on the logits in training: learned, or 1 / num_experts",
        needs=HAS_ROUTING_NOISE,
    )
    noise_scale: float = leaf(
        1.0,
        "factor on that noise",
        at_least=0,
        needs=value("moe.router", "noisy_topk", "hierarchical"),
    )
    num_groups: int = leaf(
        1, "groups of experts, of which a token may visit top_k_groups", at_least=1
    )
    top_k_groups: int = leaf(1, "groups that a token may visit", at_least=1)
    group_score: Literal["top2_sum", "max"] = leaf(
        "top2_sum",
        "what groups are ranked by: the sum of their two best experts, or their best",
        needs=all_of(HAS_GROUPS, other_than("moe.router", "hierarchical")),
    )
    mixer_threshold: float = leaf(
        0.01,
        "half the relative distance to the best within which experts compete",
        at_least=0,
        at_most=0.99,
        needs=value("moe.router", "sparse_mixer"),
    )
    sinkhorn_iterations: int = leaf(
        8,
        "iterations that balance the assignment of tokens to experts",
        at_least=1,
        at_most=10_000,
        needs=value("moe.router", "sinkhorn"),
    )
    d_router: int = leaf(
        0,
        "width in which tokens and experts are compared; 0 derives max(num_experts / 2, 8)",
        at_least=0,
        needs=value("moe.router", "cosine"),
    )
    slots_per_expert: int = leaf(
        0,
        "slots of an expert for a sequence; 0 derives top_k * seq_len / num_experts",
        at_least=0,
        needs=value("moe.router", "soft"),
    )
    allow_noncausal: bool = leaf(
        False,
        "a permission: a token's routing in training may depend on later tokens of its sequence",
    )

    # Capacity
    dispatch: Literal["dropless", "capacity"] = leaf(
        "dropless",
        "whether an expert takes every token that chose it, or only as many as it has slots",
    )
    capacity_factor: float = _capacity(
        1.25, "slots per expert, relative to a perfectly balanced load", at_least=0
    )
    eval_capacity_factor: float = _capacity(
        0.0, "capacity factor in evaluation; 0 is dropless", at_least=0
    )
    capacity_group: Literal["sequence", "device", "global"] = _capacity(
        "sequence", "the tokens that share an expert's slots"
    )
    capacity_order: Literal["position", "choice", "weight"] = _capacity(
        "position", "the order in which choices take slots"
    )
    overflow: Literal["drop", "next", "renormalize"] = _capacity(
        "drop",
        "what happens to a choice without a slot: it is dropped, goes to the next expert, or gives "
        "its weight to the token's other choices",
    )

    # Expert parallelism
    exchange: Literal["auto", "gather", "ring", "all_to_all", "ragged", "dedup", "two_level"] = (
        leaf(
            "auto",
            "the expert-parallel strategy: how tokens reach experts on other devices",
            needs=EXPERTS_ARE_SPLIT,
            may_be_unread=True,
        )
    )
    exchange_buffer: float = leaf(
        1.5,
        "rows of a send buffer, relative to their mean; what overflows it takes a slower path",
        above=0,
        at_most=1e6,
        needs=SENDS_CHOICES,
        may_be_unread=True,
    )
    exchange_chunks: int = leaf(
        1,
        "chunks of a device's tokens, so that one can be sent while another is computed",
        at_least=1,
        needs=SENDS_CHOICES,
        may_be_unread=True,
    )
    save_exchanged: bool = leaf(
        True,
        "keep received rows for the backward pass, in which remat would otherwise send them again",
        needs=all_of(EXPERTS_ARE_SPLIT, value("model.remat", True)),
        may_be_unread=True,
    )
    grouped_matmul: Literal["auto", "tiled", "ragged", "tokamax", "padded", "dense"] = leaf(
        "auto",
        "the kernel for the products of tokens with their experts' weights",
        needs=TOKENS_CHOOSE,
    )

    # Balancing
    balance_scope: Literal["global", "microbatch", "device", "sequence"] = leaf(
        "global", "the tokens over which the balance loss takes its means", needs=TOKENS_CHOOSE
    )
    balance_convention: Literal["normalized", "first_choice", "times_k", "over_k"] = leaf(
        "normalized",
        "how the balance loss is counted: 1 at balance, by first choices, K at balance, or 1/K",
        needs=TOKENS_CHOOSE,
    )
    selection_bias: bool = leaf(
        False, "a bias per expert that steers the selection only, updated from counts"
    )
    bias_rate: float = leaf(1e-3, "the step of that bias", at_least=0, needs=HAS_BIAS)
    bias_centered: bool = leaf(
        False, "subtract the mean of that bias after each step", needs=HAS_BIAS
    )

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together; 0 without any."""
        if not self.num_shared_experts:
            return 0
        return self.d_shared or self.num_shared_experts * self.d_expert

    @property
    def num_choices(self) -> int:
        """Width of the router: experts with weights, then zero-computation experts."""
        return self.num_experts + self.num_zero_computation_experts

    @property
    def num_zero_computation_experts(self) -> int:
        """Number of experts without FLOPs: zero, identity and constant ones, in this order."""
        return self.num_zero_experts + self.num_identity_experts + self.num_constant_experts

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers in the layer."""
        return self.jitter > 0 or self.expert_dropout > 0 or ROUTER_RULES[self.router].draws

    @property
    def weighted_losses(self) -> dict[str, LossSpec]:
        """The auxiliary losses whose weight is above 0."""
        losses = {}
        for name, spec in LOSS_SPECS.items():
            if getattr(self, f"{name}_weight") > 0:
                losses[name] = spec
        return losses

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router's state holds a selection bias."""
        return self.selection_bias or self.router == "quantile"


def derive_moe(moe: MoeConfig, seq_len: int) -> MoeConfig:
    """Returns the layer with its derived leaves filled in, except for the experts' width."""
    if moe.num_experts < 1:
        return moe
    derived: dict[str, Any] = {}
    if moe.score == "auto":
        derived["score"] = _default_score(moe)
    if moe.router == "cosine" and moe.d_router == 0:
        derived["d_router"] = max(moe.num_experts // 2, 8)
    if moe.router == "soft" and moe.slots_per_expert == 0:
        balanced_slots = moe.top_k * seq_len // moe.num_experts
        derived["slots_per_expert"] = max(1, balanced_slots)
    return dataclasses.replace(moe, **derived)


def _default_score(moe: MoeConfig) -> str:
    # A single sigmoid is a weight that learns; a softmax over the one selected expert is always 1.
    if moe.router == "sinkhorn" and moe.top_k == 1:
        return "sigmoid"
    return ROUTER_RULES[moe.router].scores[0]
