"""Parameters and arithmetic of a model, in closed form from its configuration.

Nothing is allocated or traced, so that a sweep can count hundreds of models, and match them by
search. The truth about parameters is `moejax.models.parameters.count_parameters`, which builds
the model; tests compare the two. The arithmetic is compared with the matrix products of
compiled programs.
"""

import collections
import dataclasses

from moejax.config import Config, MoeConfig
from moejax.moe.dispatch.capacity import capacity_slots
from moejax.moe.experts.experts import Network

BACKWARD_AND_FORWARD = 3
"""Passes: every product `x @ w` has two of the same size in the backward pass, for the gradients of x and of w."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiplications and additions of the matrix products of training, per token, forward and backward.

    Attributes:
      projections: of attention: query, key, value and output.
      scores: of attention with all positions of the row, and the sums of values by them. The mask
        saves nothing.
      dense: of dense feed-forward layers.
      router: logits, and the noise on them.
      experts: those that a token chooses, with the projections into and out of their width; what
        `soft` mixes.
      shared: what every token visits beside them: shared experts, their gate, constant experts.
      logits: of the vocabulary.
    """

    projections: int = 0
    scores: int = 0
    dense: int = 0
    router: int = 0
    experts: int = 0
    shared: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Count:
    """What a model has and does.

    Attributes:
      total: parameters.
      active: those that take part in one token's forward pass, as
        `models.parameters.ParameterCount` says.
      experts: those of the experts that tokens are routed to, which `mesh.expert` splits.
      flops: arithmetic per token, by part.
    """

    total: int
    active: int
    experts: int
    flops: Flops

    @property
    def flops_per_token(self) -> int:
        """Arithmetic of training per token, forward and backward."""
        return self.flops.total


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Parameters of a feed-forward block, and products of its forward pass over one row."""

    always: int  # parameters that every token uses
    per_expert: int = 0
    num_experts: int = 0
    num_active: int = 0
    flops: Flops = Flops()


def count(config: Config) -> Count:
    """Counts the parameters and the arithmetic of training.

    The arithmetic is what the mathematics of the model asks for, three times that of the forward
    pass: matrix products alone, `moe.top_k` experts of a token (at most `moe.num_experts`; where a
    token chooses zero, identity or constant experts they are fewer), attention over the whole row
    of `data.seq_len` positions. Where experts choose, their slots are spread over the tokens of a
    row, and parts are rounded to whole numbers.

    Left out is what an implementation adds: the sum of outputs by their weights, slots that stay
    empty, recomputation (`model.remat`, blocks of long rows, the first pass of
    `train.accumulation`), and what `schedule.top_k` takes away.

    Args:
      config: resolved.
    """
    model, length = config.model, config.data.seq_len
    d_model, d_kv = model.d_model, model.num_kv_heads * config.head_dim
    projections = 2 * d_model * d_model + 2 * d_model * d_kv
    norms = 2 * d_model + (2 * config.head_dim if model.qk_norm else 0)
    embedding = config.vocab_size * d_model
    total = (
        embedding * (1 if model.tied_embeddings else 2)
        + d_model
        + model.num_layers * (projections + norms)
    )
    active, experts = total, 0
    flops = [
        Flops(
            projections=2 * length * projections * model.num_layers,
            scores=2 * 2 * length**2 * d_model * model.num_layers,
            logits=2 * length * embedding,
        )
    ]
    for kind, num in collections.Counter(config.layers).items():
        layer = _dense(config) if kind is None else _experts(kind, d_model, length)
        total += num * (layer.always + layer.num_experts * layer.per_expert)
        experts += num * layer.num_experts * layer.per_expert
        active += num * (layer.always + layer.num_active * layer.per_expert)
        flops += [layer.flops] * num
    sums = map(sum, zip(*map(dataclasses.astuple, flops), strict=True))
    return Count(
        total, active, experts, Flops(*(round(BACKWARD_AND_FORWARD * row / length) for row in sums))
    )


def _dense(config: Config) -> _Layer:
    weights = _weights(Network(), config.model.d_model, config.model.d_ff)
    return _Layer(weights, flops=Flops(dense=2 * config.data.seq_len * weights))


def _weights(network: Network, width: int, d_hidden: int) -> int:
    """Of the matrices of one feed-forward network."""
    return (network.num_projections + 1) * width * d_hidden


def _biases(network: Network, width: int, d_hidden: int) -> int:
    return network.num_projections * d_hidden + width if network.has_bias else 0


def _experts(moe: MoeConfig, d_model: int, length: int) -> _Layer:
    network = Network(moe.activation, moe.activation_limit, moe.expert_bias)
    width, d_shared = moe.d_latent or d_model, moe.num_shared_experts * moe.d_expert
    expert, into_and_out = _weights(network, width, moe.d_expert), 2 * d_model * moe.d_latent
    shared = _weights(network, d_model, d_shared) if d_shared else 0
    beside = (
        shared
        + (d_model if moe.shared_combine == "gated" else 0)
        + moe.num_constant_experts * d_model
    )
    router_weights, router_rest = _router(moe, d_model)
    num_active = min(moe.top_k, moe.num_experts)
    rows, mixing = num_active * length, 0
    if moe.router == "expert_choice":
        rows = moe.num_experts * capacity_slots(1.0, moe.top_k, length, moe.num_experts)
    if moe.router == "soft":
        rows = moe.num_experts * moe.slots_per_expert
        mixing = 2 * length * rows * width  # of tokens in slots, and of slots in tokens
    return _Layer(
        always=router_weights + router_rest + into_and_out + beside
        + (_biases(network, d_model, d_shared) if d_shared else 0),
        per_expert=expert + _biases(network, width, moe.d_expert),
        num_experts=moe.num_experts,
        num_active=num_active,
        flops=Flops(
            router=2 * length * router_weights,
            experts=2 * (rows * expert + length * into_and_out + mixing),
            shared=2 * length * (beside + moe.top_k * moe.num_constant_experts),
        ),
    )  # fmt: skip


def _router(moe: MoeConfig, d_model: int) -> tuple[int, int]:
    """Parameters of a router: those of its matrices, and the rest. A hash router's table is none."""
    if moe.score == "uniform":
        return 0, 0
    if moe.router == "cosine":
        return (d_model + moe.num_choices) * moe.d_router, 1
    if moe.router == "soft":
        return d_model * moe.num_experts * moe.slots_per_expert, 1
    outputs, noises = moe.num_choices, 0
    if moe.router == "hierarchical":
        outputs = noises = moe.num_choices + moe.num_groups
    elif moe.router == "noisy_topk" and moe.router_noise == "learned":
        noises = outputs
    return d_model * (outputs + noises), outputs if moe.router_bias else 0
