"""Trains models of several sizes for a few steps, and fits how their activations grow."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, ConfigError, Knobs, resolve_recorded, to_dict
from moejax.data import Batch, Corpus, TrainBatches
from moejax.inspection.coordinates.measure import changes_of, measure, sizes_of
from moejax.sharding import make_mesh
from moejax.training.accumulation import loss_and_gradients
from moejax.training.state import TrainSetup, TrainState, make_train_setup
from moejax.training.step import apply_gradients, put_batch, row_keys

Axis = Literal["width", "experts", "top_k"]

WIDTH_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)
EXPERT_FACTORS = (1, 2, 4)
TOP_K_FACTORS = (1, 2, 4)

FLAT = 0.25
"""The largest slope, in the logarithm of both sizes, of what counts as flat.

A factor of 16 in width then changes a size by at most 2; where a rate does not carry over, slopes
are 0.5 to 1.
"""

ROWS = 4
"""Of a batch, at most."""


@dataclasses.dataclass(frozen=True)
class Line:
    """How a size depends on one axis.

    Attributes:
      axis: what grows.
      place: where activations were measured.
      what: "activation" before the first step, or "update", their change after the last.
      sizes: of the models along the axis.
      values: root mean squares, means over seeds.
      slope: of the logarithms.
    """

    axis: Axis
    place: str
    what: Literal["activation", "update"]
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def slope(self) -> float:
        """The slope of the logarithms; NaN of one size, or if a value is 0 or not finite."""
        values = np.array(self.values)
        if len(values) < 2:
            return math.nan
        if not (np.isfinite(values).all() and (values > 0).all()):
            return math.nan
        slope, _ = np.polyfit(np.log(self.sizes), np.log(values), 1)
        return float(slope)

    @property
    def is_judged(self) -> bool:
        """Whether the size is to be flat: logits before the first step are to shrink."""
        return (self.place, self.what) != ("logits", "activation")

    @property
    def is_flat(self) -> bool:
        """Whether the size does not grow or shrink along the axis."""
        return abs(self.slope) <= FLAT

    def to_json(self) -> dict[str, Any]:
        """Returns the line; a slope that is not known is None."""
        slope = self.slope
        return {
            "axis": self.axis,
            "place": self.place,
            "what": self.what,
            "sizes": list(self.sizes),
            "values": [value if math.isfinite(value) else None for value in self.values],
            "slope": slope if math.isfinite(slope) else None,
            "is_flat": self.is_flat,
            "is_judged": self.is_judged,
        }


def check_coordinates(
    config: Config,
    corpus: Corpus,
    *,
    num_steps: int,
    num_seeds: int,
    on_model: Callable[[Axis, int], None] = lambda axis, size: None,
) -> list[Line]:
    """Measures models of 5 widths, 3 numbers of experts and 3 of experts per token.

    Args:
      config: a resolved recipe. Its learning rate is that of every step, without a warm-up.
      corpus: its rows.
      num_steps: between the two measurements.
      num_seeds: of initial weights and order of rows, over which sizes are averaged.
      on_model: called before each model, with its axis and size.

    Raises:
      ConfigError: the recipe cannot have one of the sizes.
    """
    lines: list[Line] = []
    for axis, variants in variants_of(config).items():
        before: dict[str, list[float]] = {}
        changed: dict[str, list[float]] = {}
        for size, variant in variants.items():
            on_model(axis, size)
            sizes, changes = _train_and_measure(variant, corpus, num_steps, num_seeds)
            for place in sizes:
                before.setdefault(place, []).append(sizes[place])
                changed.setdefault(place, []).append(changes[place])
        along = tuple(variants)
        lines += [Line(axis, p, "activation", along, tuple(v)) for p, v in before.items()]
        lines += [Line(axis, p, "update", along, tuple(v)) for p, v in changed.items()]
    return lines


def variants_of(config: Config) -> dict[Axis, dict[int, Config]]:
    """Returns the configurations along each axis, by size; a dense model has widths alone.

    Widths are factors of that of the base, or without one of the recipe's own; everything that is
    as wide as the model grows along, and heads become more. Experts keep their width where their
    number or that of experts per token grows.
    """
    base = config.mup.base_width or config.model.d_model
    widths = {round(base * factor): factor for factor in WIDTH_FACTORS}
    found: dict[Axis, dict[int, Config]] = {
        "width": {width: with_width(config, width) for width in widths}
    }
    if config.moe.num_experts:
        moe = config.moe
        numbers = [moe.num_experts * factor for factor in EXPERT_FACTORS]
        found["experts"] = {number: _with_moe(config, num_experts=number) for number in numbers}
        many = moe.num_experts * TOP_K_FACTORS[-1]  # the share of chosen experts stays below half
        top_ks = [moe.top_k * factor for factor in TOP_K_FACTORS]
        found["top_k"] = {k: _with_moe(config, num_experts=many, top_k=k) for k in top_ks}
    return found


def with_width(config: Config, width: int) -> Config:
    """Returns a configuration with another width, and all that is in proportion to it."""
    factor = width / config.model.d_model
    content = to_dict(config)

    def scale(section: str, name: str) -> None:
        value = content[section][name] * factor
        if content[section][name] and round(value) != value:
            raise ConfigError(
                f"model.d_model={width} needs {section}.{name}={value:g}; give the recipe sizes "
                "that can be divided as the width can"
            )
        content[section][name] = round(value)

    scale("model", "d_model")
    scale("model", "d_ff")
    scale("attention", "num_heads")
    scale("attention", "num_kv_heads")
    if config.moe.num_experts:
        scale("moe", "d_expert")
    return resolve_recorded(content)


def _with_moe(config: Config, **leaves: Any) -> Config:
    content = to_dict(config)
    content["moe"] |= leaves
    return resolve_recorded(content)


def _train_and_measure(
    config: Config, corpus: Corpus, num_steps: int, num_seeds: int
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Returns sizes before the first step, and those of the changes; means over seeds."""
    rows = min(config.train.batch_size, ROWS)
    train = dataclasses.replace(config.train, batch_size=rows, accumulation=1)
    config = dataclasses.replace(config, train=train)
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    sizes: list[Mapping[str, float]] = []
    changes: list[Mapping[str, float]] = []
    with jax.set_mesh(setup.mesh):
        step = jax.jit(_step_of(setup))
        for seed in range(num_seeds):
            batches = TrainBatches(corpus, rows, seed, range(rows))
            fixed = put_batch(batches[num_steps], setup)
            state = setup.init(seed)
            before = measure(setup.graphdef, state.params, state.router_state, fixed)
            for number in range(num_steps):
                state = step(state, put_batch(batches[number], setup))
            after = measure(setup.graphdef, state.params, state.router_state, fixed)
            sizes.append(sizes_of(before))
            changes.append(changes_of(before, after))
    return _means(sizes), _means(changes)


def _step_of(setup: TrainSetup) -> Callable[[TrainState, Batch], TrainState]:
    """Returns a step at the highest learning rate, whatever the schedule."""
    knobs = Knobs.from_config(setup.config)

    def step(state: TrainState, batch: Batch) -> TrainState:
        keys_B = row_keys(setup.config, knobs, state.step, len(batch.tokens_BL))
        grads, _ = loss_and_gradients(setup, state.params, state.router_state, batch, knobs, keys_B)
        rate = jnp.float32(setup.config.optimizer.learning_rate)
        params, opt_state, _ = apply_gradients(setup, state, grads, rate)
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)

    return step


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {place: float(np.mean([one[place] for one in measured])) for place in measured[0]}
