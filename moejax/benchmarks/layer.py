"""The experts of one layer by every implementation, over a dense layer with the same active FLOPs.

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

from moejax.benchmarks.timing import Peaks, Times, interleave
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, resolve_implementation
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.on_device import apply_to_equal_groups, run_dropless, run_with_capacity
from moejax.moe.experts.experts import ExpertWeights

DIRECTIONS = ("forward", "forward_backward")
CAPACITY_FACTORS = (1.0, 1.25)
DENSE = "dense_layer"
SORTED = "sorted"
"""The experts' products without the plumbing: tokens in order, as many for every expert, whatever was chosen."""


class ShapeError(ValueError):
    """Text that names no layer."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer.

    Attributes:
      tokens: T.
      d_model: D.
      d_expert: F.
      num_experts: E.
      top_k: K.
      is_skewed: half of all choices are of one expert, or as many as there are tokens.
    """

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    is_skewed: bool = False

    def __str__(self) -> str:
        """As `parse_shapes` takes it."""
        sizes = self.tokens, self.d_model, self.d_expert, self.num_experts, self.top_k
        return ":".join(map(str, sizes)) + (":skewed" if self.is_skewed else "")

    def flops(self, direction: str) -> int:
        """Of the experts' three products, for the chosen ones; a backward pass has twice as many."""
        passes = {"forward": 1, "forward_backward": 3}[direction]
        return passes * 6 * self.tokens * self.top_k * self.d_model * self.d_expert


PRESETS = {
    "switch": Shape(4096, 512, 1024, 64, 1),
    "mixtral": Shape(4096, 512, 1024, 8, 2),
    "mixtral-64": Shape(4096, 512, 1024, 64, 2),
    "olmoe": Shape(4096, 512, 256, 64, 8),
    "deepseek": Shape(4096, 512, 256, 256, 8),
}
"""Proportions of published layers (Switch Transformer, Mixtral, OLMoE, DeepSeek-V3) at a width that fits."""


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from a comma-separated list of presets or `T:D:F:E:K`, each with `:skewed` after it or not.

    Raises:
      ShapeError: a name that is no preset, or numbers that make no layer.
    """
    return [_parse_shape(item.strip()) for item in text.split(",")]


def _parse_shape(item: str) -> Shape:
    parts = item.split(":")
    is_skewed = parts[-1] == "skewed"
    parts = parts[:-1] if is_skewed else parts
    if len(parts) == 1 and parts[0] in PRESETS:
        return dataclasses.replace(PRESETS[parts[0]], is_skewed=is_skewed)
    if len(parts) != 5 or not all(part.isdecimal() and int(part) for part in parts):
        raise ShapeError(
            f"--shapes: {item!r} must be one of {', '.join(PRESETS)} or five positive numbers "
            "tokens:d_model:d_expert:num_experts:top_k, such as 4096:512:256:64:8, with :skewed after it or not"
        )
    tokens, d_model, d_expert, num_experts, top_k = map(int, parts)
    shape = Shape(tokens, d_model, d_expert, num_experts, top_k, is_skewed)
    if shape.top_k > shape.num_experts:
        raise ShapeError(
            f"--shapes: {item!r}: top_k={shape.top_k} must be at most num_experts={shape.num_experts}; lower it"
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
    layers = implementations_of(shape)
    rows = []
    for direction in directions:
        dense_inputs = arrays.x_TD, *arrays.dense_weights
        inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
        programs = {DENSE: Program.compile(dense_layer, direction, arrays.dy_TD, dense_inputs)}
        for name in implementations:
            layer = functools.partial(through, layers[name])
            programs[name] = Program.compile(
                layer, direction, arrays.dy_TD, inputs, (arrays.experts_TK,)
            )
        logging.getLogger("moejax").info(
            "measuring %s %s: %s", shape, direction, ", ".join(programs)
        )
        times = interleave(programs, repetitions, warm_up=1)  # they are compiled
        rows += [
            _row(shape, name, direction, dtype, times, programs[name], peaks) for name in programs
        ]
    return rows


def implementations_of(shape: Shape) -> dict[str, Callable[..., jax.Array]]:
    """By name: functions of tokens `[1, T, D]`, `TokenChoice` and `ExpertWeights`."""
    dropless = {
        name: functools.partial(run_dropless, implementation=name)
        for name in ("auto", *IMPLEMENTATIONS)
    }
    capacity = {f"capacity {factor:g}": _capacity(shape, factor) for factor in CAPACITY_FACTORS}
    return dropless | capacity | {SORTED: _run_sorted}


def default_implementations() -> list[str]:
    """The one of this platform, and what it stands beside."""
    return [
        resolve_implementation("auto"),
        *(f"capacity {factor:g}" for factor in CAPACITY_FACTORS),
        SORTED,
    ]


def _capacity(shape: Shape, factor: float) -> Callable[..., jax.Array]:
    slots = math.ceil(factor * shape.tokens * shape.top_k / shape.num_experts)

    def run(x_BLD, chosen, weights):
        return run_with_capacity(x_BLD, chosen, weights, slots=slots)

    return run


def _run_sorted(x_BLD: jax.Array, chosen: TokenChoice, weights: ExpertWeights) -> jax.Array:
    """Each token K times in order, in equal groups without a rest (rows of zeros), and the weighted sum."""
    x_TD, weights_TK = x_BLD[0], chosen.weights_BLK[0].astype(x_BLD.dtype)
    num_tokens, top_k = weights_TK.shape
    rest_RD = jnp.zeros(
        (-num_tokens * top_k % weights.down_EFD.shape[0], x_TD.shape[1]), x_TD.dtype
    )
    y_RD = apply_to_equal_groups(jnp.concatenate([*[x_TD] * top_k, rest_RD]), weights)
    # Not as reshapes and sums over K, which XLA:CPU does not fuse: they took half as long as
    # the products.
    parts = [
        y_RD[k * num_tokens : (k + 1) * num_tokens] * weights_TK[:, k : k + 1] for k in range(top_k)
    ]
    return functools.reduce(jnp.add, parts)[None]


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
    """Random inputs; choices as a router with random logits makes them."""
    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*sizes: int) -> jax.Array:
        return (jax.random.normal(next(keys), sizes) * sizes[-2] ** -0.5).astype(dtype)

    experts, d_model, width = shape.num_experts, shape.d_model, shape.top_k * shape.d_expert
    return Arrays(
        x_TD=normal(shape.tokens, d_model) * shape.tokens**0.5,
        dy_TD=normal(shape.tokens, d_model) * shape.tokens**0.5,
        experts_TK=jnp.asarray(choose(shape)),
        weights_TK=jax.nn.softmax(jax.random.normal(next(keys), (shape.tokens, shape.top_k))),
        expert_weights=(
            normal(experts, d_model, 2 * shape.d_expert).reshape(experts, d_model, 2, -1),
            normal(experts, shape.d_expert, d_model),
        ),
        dense_weights=(normal(d_model, width), normal(d_model, width), normal(width, d_model)),
    )


def choose(shape: Shape) -> np.ndarray:
    """Experts `[T, K]`, no expert twice for a token."""
    rng = np.random.default_rng(0)
    experts_TK = np.argsort(rng.normal(size=(shape.tokens, shape.num_experts)), axis=1)[
        :, : shape.top_k
    ]
    if shape.is_skewed:
        without = np.flatnonzero((experts_TK != 0).all(axis=1))
        missing = min(shape.tokens, shape.tokens * shape.top_k // 2) - (shape.tokens - len(without))
        experts_TK[without[: max(0, missing)], -1] = 0
    return experts_TK.astype(np.int32)


def dense_layer(
    x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array
) -> jax.Array:
    """SwiGLU of K * F hidden units."""
    return (jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)) @ down_FD


def through(layer, x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK):
    """One sequence of tokens through a layer of `implementations_of`."""
    chosen = TokenChoice(experts_TK[None], weights_TK[None])
    return layer(x_TD[None], chosen, ExpertWeights(gate_up_EDPF, down_EFD))[0]


def program_of(function: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """A function of `dy_TD, inputs, choices`, which calls `function(*inputs, *choices)`.

    Everything is an argument: XLA would spend minutes on sorting constants while it compiles.
    """

    def forward(dy_TD, inputs, choices):
        return function(*inputs, *choices)

    def forward_backward(dy_TD, inputs, choices):
        y_TD, pull = jax.vjp(lambda *inputs: function(*inputs, *choices), *inputs)
        return y_TD, pull(dy_TD)

    return {"forward": forward, "forward_backward": forward_backward}[direction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function with its arguments."""

    compiled: Any
    arguments: tuple[Any, ...]

    @classmethod
    def compile(
        cls, function, direction: str, dy_TD, inputs: tuple, choices: tuple = ()
    ) -> "Program":
        """Of `function(*inputs, *choices)` or with its gradients for `inputs`; see `program_of`."""
        arguments = dy_TD, inputs, choices
        return cls(jax.jit(program_of(function, direction)).lower(*arguments).compile(), arguments)

    def __call__(self) -> Any:
        """Runs once."""
        return self.compiled(*self.arguments)

    @property
    def temporary_bytes(self) -> int:
        """Beside arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


def named_row(shape: Shape, name: str, direction: str, dtype: str) -> dict[str, Any]:
    """What every row of a table of layers begins with."""
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "implementation": name,
        "direction": direction,
        "dtype": dtype,
    }
    row["skewed"] = row.pop("is_skewed")
    return row


def _weight_bytes(shape: Shape, name: str, direction: str, dtype: str) -> int:
    """All matrices read once; with gradients read twice and written once."""
    passes = {"forward": 1, "forward_backward": 3}[direction]
    matrices = 3 * (shape.top_k if name == DENSE else shape.num_experts)
    return passes * matrices * shape.d_model * shape.d_expert * jnp.dtype(dtype).itemsize


def _row(
    shape: Shape,
    name: str,
    direction: str,
    dtype: str,
    times: dict[str, Times],
    program: Program,
    peaks: Peaks,
) -> dict[str, Any]:
    seconds = times[name].median_ms / 1e3
    gflops = shape.flops(direction) / seconds / 1e9
    gbytes = _weight_bytes(shape, name, direction, dtype) / seconds / 1e9
    return named_row(shape, name, direction, dtype) | {
        "ms": round(times[name].median_ms, 3),
        "quartiles_ms": [round(ms, 3) for ms in times[name].quartiles_ms],
        "ratio_to_dense": round(times[name].median_ms / times[DENSE].median_ms, 3),
        "gflops": float(f"{gflops:.4g}"),
        "fraction_of_peak_gflops": round(gflops / peaks.gflops, 3),
        "gbytes": round(gbytes, 2),
        "fraction_of_peak_gbytes": round(gbytes / peaks.gbytes, 3),
        "temporary_bytes": program.temporary_bytes,
    }
