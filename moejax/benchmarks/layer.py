"""Times the experts of one layer, by implementation, over a dense layer of the same active FLOPs.

Tokens are dispatched, go through their experts and are combined; choices and weights are given, so
the router is not part of it. The dense layer is written in its fastest form: two products in, one
out, weights as arguments.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.benchmarks.timing import Arguments, Peaks, Program, Times, interleave, rounded
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, resolve_implementation
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.on_device import apply_to_equal_groups, run_dropless, run_with_capacity
from moejax.moe.experts.experts import ExpertWeights

PASSES = {"forward": 1, "forward_backward": 3}
"""By direction, its arithmetic in units of the forward pass."""

DIRECTIONS = tuple(PASSES)
CAPACITY_FACTORS = (1.0, 1.25)
DENSE = "dense_layer"
SORTED = "sorted"
"""The experts' products without dispatch and combine.

Tokens are in order, the same number for every expert, whatever was chosen.
"""


log = logging.getLogger("moejax")


class ShapeError(ValueError):
    """The text names no layer."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer.

    Attributes:
      tokens: T.
      d_model: D.
      d_expert: F.
      num_experts: E.
      top_k: K.
      is_skewed: whether one expert has half of all choices, or as many as there are tokens.
    """

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    is_skewed: bool = False

    def __str__(self) -> str:
        """Returns the text that `parse_shapes` reads."""
        sizes = (self.tokens, self.d_model, self.d_expert, self.num_experts, self.top_k)
        text = ":".join(map(str, sizes))
        if self.is_skewed:
            return f"{text}:skewed"
        return text

    def flops(self, direction: str) -> int:
        """Returns the arithmetic of the chosen experts; a backward pass has twice as much."""
        num_rows = self.tokens * self.top_k
        flops_of_row = 6 * self.d_model * self.d_expert
        return PASSES[direction] * num_rows * flops_of_row


PRESETS = {
    "switch": Shape(4096, 512, 1024, 64, 1),
    "mixtral": Shape(4096, 512, 1024, 8, 2),
    "mixtral-64": Shape(4096, 512, 1024, 64, 2),
    "olmoe": Shape(4096, 512, 256, 64, 8),
    "deepseek": Shape(4096, 512, 256, 256, 8),
}
"""Proportions of published layers at a width that fits.

They are those of Switch Transformer, Mixtral, OLMoE and DeepSeek-V3.
"""


def parse_shapes(text: str) -> list[Shape]:
    """Reads shapes from a comma-separated list of presets or `T:D:F:E:K`.

    Each may have `:skewed` after it.

    Raises:
      ShapeError: a name that is no preset, or numbers that make no layer.
    """
    return [_parse_shape(item.strip()) for item in text.split(",")]


def _parse_shape(item: str) -> Shape:
    """Reads one shape."""
    parts = item.split(":")
    is_skewed = parts[-1] == "skewed"
    parts = parts[:-1] if is_skewed else parts
    if len(parts) == 1 and parts[0] in PRESETS:
        return dataclasses.replace(PRESETS[parts[0]], is_skewed=is_skewed)
    are_positive = all(part.isdecimal() and int(part) for part in parts)
    if len(parts) != 5 or not are_positive:
        raise ShapeError(
            f"--shapes: {item!r} must be one of {', '.join(PRESETS)} or five positive numbers "
            "tokens:d_model:d_expert:num_experts:top_k, such as 4096:512:256:64:8, with :skewed "
            "after it or not"
        )
    tokens, d_model, d_expert, num_experts, top_k = map(int, parts)
    shape = Shape(tokens, d_model, d_expert, num_experts, top_k, is_skewed)
    if top_k > num_experts:
        raise ShapeError(
            f"--shapes: {item!r}: top_k={top_k} must be at most num_experts={num_experts}; lower it"
        )
    return shape


def bench_layer(
    shape: Shape,
    implementations: Sequence[str],
    directions: Sequence[str],
    dtype: str,
    repetitions: int,
    peaks: Peaks,
) -> list[dict[str, Any]]:
    """Times all of these on one shape, the dense layer among them.

    Args:
      shape: of the layer.
      implementations: names from `implementations_of`.
      directions: some of `DIRECTIONS`.
      dtype: of tokens and weights.
      repetitions: of every program, in turn.
      peaks: of this machine.

    Returns:
      A row for each direction and implementation, the dense layer first.
    """
    arrays = draw(shape, dtype)
    rows = []
    for direction in directions:
        programs = _compile(shape, implementations, direction, arrays)
        log.info("measuring %s %s: %s", shape, direction, ", ".join(programs))
        times = interleave(programs, repetitions, warm_up=1)  # they are compiled
        for name, program in programs.items():
            row = named_row(shape, name, direction, dtype)
            figures = _figures(row, shape, times, peaks)
            temporary = {"temporary_bytes": program.temporary_bytes}
            rows.append(row | figures | temporary)
    return rows


def _compile(
    shape: Shape,
    implementations: Sequence[str],
    direction: str,
    arrays: "Arrays",
) -> dict[str, Program]:
    """Returns the compiled dense layer and implementations, by name."""
    layers = implementations_of(shape)
    dense_arguments = Arguments(arrays.dy_TD, (arrays.x_TD, *arrays.dense_weights))
    arguments = Arguments(
        dy_TD=arrays.dy_TD,
        inputs=(arrays.x_TD, arrays.weights_TK, *arrays.expert_weights),
        choices=(arrays.experts_TK,),
    )
    programs = {DENSE: Program.compile(dense_layer, direction, dense_arguments)}
    for name in implementations:
        layer = functools.partial(through, layers[name])
        programs[name] = Program.compile(layer, direction, arguments)
    return programs


def implementations_of(shape: Shape) -> dict[str, Callable[..., jax.Array]]:
    """Returns by name functions of tokens `[1, T, D]`, `TokenChoice` and `ExpertWeights`."""
    layers: dict[str, Callable[..., jax.Array]] = {}
    for name in ("auto", *IMPLEMENTATIONS):
        layers[name] = functools.partial(run_dropless, implementation=name)
    for factor in CAPACITY_FACTORS:
        layers[f"capacity {factor:g}"] = _capacity(shape, factor)
    layers[SORTED] = _run_sorted
    return layers


def default_implementations() -> list[str]:
    """Returns the implementation of this platform, and those it is compared with."""
    capacity = [f"capacity {factor:g}" for factor in CAPACITY_FACTORS]
    return [resolve_implementation("auto"), *capacity, SORTED]


def _capacity(shape: Shape, factor: float) -> Callable[..., jax.Array]:
    """Returns experts with the slots that a capacity factor gives each of them."""
    mean_choices = shape.tokens * shape.top_k / shape.num_experts
    slots = math.ceil(factor * mean_choices)

    def run(x_BLD, chosen, weights):
        return run_with_capacity(x_BLD, chosen, weights, slots=slots)

    return run


def _run_sorted(
    x_BLD: jax.Array,
    chosen: TokenChoice,
    weights: ExpertWeights,
) -> jax.Array:
    """Sends each token K times, in order, through equal groups, and returns the weighted sum.

    Padding rows of zeros make the number of rows a multiple of E.
    """
    x_TD = x_BLD[0]
    weights_TK = chosen.weights_BLK[0]
    weights_TK = weights_TK.astype(x_TD.dtype)
    num_tokens, top_k = weights_TK.shape
    d_model = x_TD.shape[1]
    num_experts = len(weights.down_EFD)
    num_padding = -num_tokens * top_k % num_experts
    padding_RD = jnp.zeros((num_padding, d_model), x_TD.dtype)
    copies = [x_TD] * top_k
    x_RD = jnp.concatenate([*copies, padding_RD])
    y_RD = apply_to_equal_groups(x_RD, weights)
    # Not as reshapes and sums over K, which XLA:CPU does not fuse: they took half as long as
    # the products.
    parts = []
    for k in range(top_k):
        first = k * num_tokens
        end = first + num_tokens
        weight_T1 = weights_TK[:, k : k + 1]
        parts.append(y_RD[first:end] * weight_T1)
    y_TD = functools.reduce(jnp.add, parts)
    return y_TD[None]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Inputs of a layer and its dense twin."""

    x_TD: jax.Array
    dy_TD: jax.Array
    experts_TK: jax.Array
    weights_TK: jax.Array
    expert_weights: tuple[jax.Array, jax.Array]
    dense_weights: tuple[jax.Array, jax.Array, jax.Array]


def draw(shape: Shape, dtype: str) -> Arrays:
    """Draws random inputs; choices are those of a router with random logits."""
    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*sizes: int) -> jax.Array:
        drawn = jax.random.normal(next(keys), sizes)
        scaled = drawn * sizes[-2] ** -0.5
        return scaled.astype(dtype)

    num_experts = shape.num_experts
    d_model = shape.d_model
    d_expert = shape.d_expert
    dense_width = shape.top_k * d_expert
    token_scale = shape.tokens**0.5  # undoes that of `normal`
    x_TD = normal(shape.tokens, d_model) * token_scale
    dy_TD = normal(shape.tokens, d_model) * token_scale
    logits_TK = jax.random.normal(next(keys), (shape.tokens, shape.top_k))
    gate_up_EDX = normal(num_experts, d_model, 2 * d_expert)
    gate_up_EDPF = gate_up_EDX.reshape(num_experts, d_model, 2, -1)
    down_EFD = normal(num_experts, d_expert, d_model)
    dense_weights = (
        normal(d_model, dense_width),
        normal(d_model, dense_width),
        normal(dense_width, d_model),
    )
    return Arrays(
        x_TD=x_TD,
        dy_TD=dy_TD,
        experts_TK=jnp.asarray(choose(shape)),
        weights_TK=jax.nn.softmax(logits_TK),
        expert_weights=(gate_up_EDPF, down_EFD),
        dense_weights=dense_weights,
    )


def choose(shape: Shape) -> np.ndarray:
    """Draws experts `[T, K]`, no expert twice for a token."""
    rng = np.random.default_rng(0)
    noise_TE = rng.normal(size=(shape.tokens, shape.num_experts))
    ranking_TE = np.argsort(noise_TE, axis=1)
    experts_TK = ranking_TE[:, : shape.top_k]
    if shape.is_skewed:
        _skew(experts_TK)
    return experts_TK.astype(np.int32)


def _skew(experts_TK: np.ndarray) -> None:
    """Replaces choices by the first expert, until it has half of all, or every token."""
    num_tokens, top_k = experts_TK.shape
    is_other_TK = experts_TK != 0
    lacks_first_T = is_other_TK.all(axis=1)
    lacking = np.flatnonzero(lacks_first_T)
    num_with = num_tokens - len(lacking)
    half_of_all = num_tokens * top_k // 2
    num_wanted = min(num_tokens, half_of_all)
    num_missing = max(0, num_wanted - num_with)
    experts_TK[lacking[:num_missing], -1] = 0


def dense_layer(
    x_TD: jax.Array,
    gate_DF: jax.Array,
    up_DF: jax.Array,
    down_FD: jax.Array,
) -> jax.Array:
    """Returns the output of a SwiGLU network of K * F hidden units."""
    gate_TF = jax.nn.silu(x_TD @ gate_DF)
    up_TF = x_TD @ up_DF
    hidden_TF = gate_TF * up_TF
    return hidden_TF @ down_FD


def through(layer, x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK):
    """Sends one sequence of tokens through a layer of `implementations_of`."""
    chosen = TokenChoice(experts_TK[None], weights_TK[None])
    weights = ExpertWeights(gate_up_EDPF, down_EFD)
    y_1TD = layer(x_TD[None], chosen, weights)
    return y_1TD[0]


def named_row(shape: Shape, name: str, direction: str, dtype: str) -> dict[str, Any]:
    """Returns what every row of a table of layers begins with."""
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "implementation": name,
        "direction": direction,
        "dtype": dtype,
    }
    row["skewed"] = row.pop("is_skewed")
    return row


def _weight_bytes(shape: Shape, name: str, direction: str, dtype: str) -> int:
    """Counts all matrices as read once; with gradients as read twice and written once."""
    num_networks = shape.top_k if name == DENSE else shape.num_experts
    number_bytes = jnp.dtype(dtype).itemsize
    matrix_bytes = shape.d_model * shape.d_expert * number_bytes
    network_bytes = 3 * matrix_bytes
    return PASSES[direction] * num_networks * network_bytes


def _figures(
    row: dict[str, Any],
    shape: Shape,
    times: dict[str, Times],
    peaks: Peaks,
) -> dict[str, Any]:
    """Returns the times of the program that a row names, and what it reaches."""
    name = row["implementation"]
    direction = row["direction"]
    median_ms = times[name].median_ms
    seconds = median_ms / 1e3
    gflops = shape.flops(direction) / seconds / 1e9
    weight_bytes = _weight_bytes(shape, name, direction, row["dtype"])
    gbytes = weight_bytes / seconds / 1e9
    return {
        "ms": round(median_ms, 3),
        "quartiles_ms": rounded(times[name].quartiles_ms, 3),
        "ratio_to_dense": round(median_ms / times[DENSE].median_ms, 3),
        "gflops": float(f"{gflops:.4g}"),
        "fraction_of_peak_gflops": round(gflops / peaks.gflops, 3),
        "gbytes": round(gbytes, 2),
        "fraction_of_peak_gbytes": round(gbytes / peaks.gbytes, 3),
    }
