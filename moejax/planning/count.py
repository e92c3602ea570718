"""Parameters and arithmetic of a model, in closed form from its configuration.

Nothing is allocated or traced, so that a sweep can count hundreds of models, and match them by
search. The truth about parameters is `moejax.models.parameters.count_parameters`, which builds
the model; tests compare the two. The arithmetic is compared with the matrix products of
compiled programs.
"""

import collections
import dataclasses

from moejax.config import Config, ModelConfig, MoeConfig
from moejax.moe.dispatch.capacity import capacity_slots
from moejax.moe.experts.experts import Network

BACKWARD_AND_FORWARD = 3
"""Passes of training in units of the forward pass.

Every product `x @ w` has two of the same size in the backward pass, for the gradients of x and
of w.
"""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiplications and additions of the matrix products of training, per token.

    Attributes:
      projections: of attention: query, key, value and output.
      scores: of attention with all positions of the row, and the sums of values by them. The mask
        saves nothing.
      dense: of dense feed-forward layers.
      router: logits, and the noise on them.
      experts: those that a token chooses, with the projections into and out of their width; what
        `soft` mixes.
      shared: what every token visits in addition: shared experts, their gate, constant experts.
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
        """The sum of all parts."""
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
    """Parameters of a part of the model, and products of its forward pass over one row."""

    always: int  # parameters that every token uses, or as many as it uses
    unused: int = 0  # others that are not in experts of a MoE layer
    per_expert: int = 0
    num_experts: int = 0
    num_active: int = 0
    flops: Flops = Flops()

    @property
    def in_experts(self) -> int:
        """Parameters of all experts."""
        return self.num_experts * self.per_expert

    @property
    def total(self) -> int:
        """All parameters."""
        return self.always + self.unused + self.in_experts

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward pass."""
        return self.always + self.num_active * self.per_expert


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
    outside = _outside_feed_forward(config)
    total = outside.total
    active = outside.always
    experts = 0
    row_flops = [outside.flops]
    for kind, num in collections.Counter(config.layers).items():
        layer = _feed_forward(config, kind)
        total += num * layer.total
        active += num * layer.active
        experts += num * layer.in_experts
        row_flops += [layer.flops] * num
    flops = _training_flops(row_flops, config.data.seq_len)
    return Count(total, active, experts, flops)


def _training_flops(row_flops: list[Flops], length: int) -> Flops:
    """Returns the arithmetic of training per token, from that of forward passes over one row."""
    per_token = {}
    for part in dataclasses.fields(Flops):
        name = part.name
        of_row = sum(getattr(flops, name) for flops in row_flops)
        of_training = BACKWARD_AND_FORWARD * of_row
        per_token[name] = round(of_training / length)
    return Flops(**per_token)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Counts of the attention of a layer.

    Attributes:
      projections: weights of its matrices.
      vectors: weights of its norms, biases and sinks.
      width: of all queries together, which the products with keys have.
      value_width: of all values together, as each head sees them.
      unused: weights that take no part in one token's forward pass.
    """

    projections: int
    vectors: int
    width: int
    value_width: int
    unused: int = 0


def _attention(config: Config) -> _Attention:
    if config.attention.kind == "latent":
        return _latent_attention(config)
    if config.attention.kind == "routed":
        return _routed_attention(config)
    attention, d_model = config.attention, config.model.d_model
    d_query = attention.num_heads * config.head_dim
    d_kv = attention.num_kv_heads * config.head_dim
    query_and_output = 2 * d_model * d_query
    key_and_value = 2 * d_model * d_kv
    vectors = 0
    norm_vectors = _norm_vectors(config.model)
    if attention.qk_norm == "head":
        vectors += norm_vectors * 2 * config.head_dim
    if attention.qk_norm == "whole":
        vectors += norm_vectors * (d_query + d_kv)
    if attention.qkv_bias:
        vectors += d_query + 2 * d_kv
    if attention.sinks:
        vectors += attention.num_heads
    if attention.out_bias:
        vectors += d_model
    return _Attention(query_and_output + key_and_value, vectors, d_query, d_query)


def _routed_attention(config: Config) -> _Attention:
    attention, d_model = config.attention, config.model.d_model
    d_heads = attention.num_kv_heads * config.head_dim
    expert = 2 * d_model * d_heads
    key_and_value = 2 * d_model * d_heads
    router = d_model * attention.num_query_experts
    vectors = d_model if attention.out_bias else 0
    d_query = attention.top_k_query_experts * d_heads
    return _Attention(
        attention.num_query_experts * expert + key_and_value + router,
        vectors,
        d_query,
        d_query,
        unused=(attention.num_query_experts - attention.top_k_query_experts) * expert,
    )


def _latent_attention(config: Config) -> _Attention:
    attention, d_model = config.attention, config.model.d_model
    heads, d_latent = attention.num_heads, attention.d_kv_latent
    d_query = heads * (attention.d_nope + attention.d_rope)
    d_value = heads * attention.d_value
    query_in = attention.d_query_latent or d_model
    query_down = d_model * attention.d_query_latent
    query = query_in * d_query
    kv_down = d_model * (d_latent + attention.d_rope)
    kv_up = d_latent * (heads * attention.d_nope + d_value)
    output = d_value * d_model
    vectors = attention.d_query_latent + d_latent
    if attention.latent_bias:
        vectors += attention.d_query_latent + d_latent + attention.d_rope
    if attention.out_bias:
        vectors += d_model
    return _Attention(query_down + query + kv_down + kv_up + output, vectors, d_query, d_value)


def _outside_feed_forward(config: Config) -> _Layer:
    """Counts the embeddings, and attention and the norms of all layers."""
    model = config.model
    length = config.data.seq_len
    d_model = model.d_model
    attention = _attention(config)
    norm = _norm_vectors(model) * d_model
    norms = _norms_of_layer(model) * norm
    num_blocks = 2 * model.num_layers if model.shortcut else model.num_layers
    layers = num_blocks * (attention.projections + attention.vectors + norms)
    final_norm = norm
    logits_bias = config.vocab_size if model.logits_bias else 0
    embedding = config.vocab_size * d_model
    num_embeddings = 1 if model.tied_embeddings else 2
    score_width = attention.width + attention.value_width
    used = attention.projections - attention.unused
    flops = Flops(
        projections=2 * length * used * num_blocks,
        scores=2 * length**2 * score_width * num_blocks,
        logits=2 * length * embedding,
    )
    always = num_embeddings * embedding + logits_bias + final_norm + layers
    unused = attention.unused * num_blocks
    return _Layer(always - unused, unused=unused, flops=flops)


def _norm_vectors(model: ModelConfig) -> int:
    """Returns how many vectors a norm has: a scale, and perhaps a bias."""
    return 2 if model.norm == "layer" else 1


def _norms_of_layer(model: ModelConfig) -> int:
    if model.parallel_residual:
        return 1
    return 4 if model.norm_order == "sandwich" else 2


def _feed_forward(config: Config, kind: MoeConfig | None) -> _Layer:
    """Counts a layer of experts, or a dense one where there is no kind."""
    if kind is None:
        return _dense(config)
    experts = _experts(kind, config.model.d_model, config.data.seq_len)
    if not config.model.shortcut:
        return experts
    return _with_two_dense(experts, _dense(config))


def _dense(config: Config) -> _Layer:
    """Counts a dense layer."""
    network = Network(has_bias=config.model.ffn_bias)
    weights = _weights(network, config.model.d_model, config.model.d_ff)
    biases = _biases(network, config.model.d_model, config.model.d_ff)
    flops = Flops(dense=2 * config.data.seq_len * weights)
    return _Layer(weights + biases, flops=flops)


def _with_two_dense(experts: _Layer, dense: _Layer) -> _Layer:
    """Returns the counts of experts and of two dense networks beside them."""
    flops = dataclasses.replace(experts.flops, dense=2 * dense.flops.dense)
    return dataclasses.replace(experts, always=experts.always + 2 * dense.always, flops=flops)


def _weights(network: Network, width: int, d_hidden: int) -> int:
    """Counts the weights of the matrices of one feed-forward network."""
    num_matrices = network.num_projections + 1
    return num_matrices * width * d_hidden


def _biases(network: Network, width: int, d_hidden: int) -> int:
    """Counts the biases of one feed-forward network."""
    if not network.has_bias:
        return 0
    return network.num_projections * d_hidden + width


def _experts(moe: MoeConfig, d_model: int, length: int) -> _Layer:
    """Counts a layer of experts."""
    network = Network(moe.activation, moe.activation_limit, moe.expert_bias)
    width = moe.d_latent or d_model
    expert = _weights(network, width, moe.d_expert)
    latent = 2 * d_model * moe.d_latent  # projections down to the experts' width, and up again
    shared, shared_biases = _shared(moe, network, d_model)
    router_weights, router_rest = _router(moe, d_model)
    rows = _expert_rows(moe, length)
    mixing = 0
    if moe.router == "soft":
        # Of tokens into slots, and of slots into tokens.
        mixing = 2 * length * rows * width
    constant_weights = moe.top_k * moe.num_constant_experts
    flops = Flops(
        router=2 * length * router_weights,
        experts=2 * (rows * expert + length * latent + mixing),
        shared=2 * length * (shared + constant_weights),
    )
    router = router_weights + router_rest
    output_bias = d_model if moe.output_bias else 0
    return _Layer(
        always=router + latent + shared + shared_biases + output_bias,
        per_expert=expert + _biases(network, width, moe.d_expert),
        num_experts=moe.num_experts,
        num_active=min(moe.top_k, moe.num_experts),
        flops=flops,
    )


def _shared(moe: MoeConfig, network: Network, d_model: int) -> tuple[int, int]:
    """Counts weights and biases of what every token visits in addition to its experts."""
    constant_experts = moe.num_constant_experts * d_model
    gate = d_model if moe.shared_combine == "gated" else 0
    d_shared = moe.shared_width
    if not d_shared:
        return gate + constant_experts, 0
    has_bias = moe.expert_bias or moe.shared_bias
    network = dataclasses.replace(network, has_bias=has_bias)
    shared_experts = _weights(network, d_model, d_shared)
    weights = shared_experts + gate + constant_experts
    biases = _biases(network, d_model, d_shared)
    return weights, biases


def _expert_rows(moe: MoeConfig, length: int) -> int:
    """Counts the rows that go through experts for one row of `length` tokens."""
    if moe.router == "expert_choice":
        slots = capacity_slots(1.0, moe.top_k, length, moe.num_experts)
        return moe.num_experts * slots
    if moe.router == "soft":
        return moe.num_experts * moe.slots_per_expert
    visited = min(moe.top_k, moe.num_experts)
    return visited * length


def _router(moe: MoeConfig, d_model: int) -> tuple[int, int]:
    """Counts a router's parameters in matrices, and its others; a hash table is no parameter."""
    if moe.score == "uniform":
        return 0, 0
    if moe.router == "cosine":
        inputs_and_experts = d_model + moe.num_choices
        return inputs_and_experts * moe.d_router, 1
    if moe.router == "soft":
        num_slots = moe.num_experts * moe.slots_per_expert
        return d_model * num_slots, 1
    outputs = moe.num_choices
    has_learned_noise = moe.router == "noisy_topk" and moe.router_noise == "learned"
    if moe.router == "hierarchical":
        outputs += moe.num_groups
        has_learned_noise = True
    noise_outputs = outputs if has_learned_noise else 0
    biases = outputs if moe.router_bias else 0
    return d_model * (outputs + noise_outputs), biases
