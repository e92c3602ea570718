"""What a checkpoint would lose under other routing: the same validation rows, with one change at a time.

The model is run layer by layer. A change touches few layers: those before it are run once for all
changes, and a layer with other weights or another blocked expert is the same program with other
arguments, so that the ablation of every expert of every layer compiles nothing anew.
"""

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from moejax.config import nearest
from moejax.data import Batch, Corpus
from moejax.data.batches import to_batch
from moejax.data.packing import empty_row
from moejax.inference.load import LoadedRun, load_run
from moejax.inspection.analysis.trace import spread_rows
from moejax.inspection.counterfactuals import interventions
from moejax.inspection.counterfactuals.plan import (
    CAPACITY_FACTORS,
    KINDS,
    NUM_PAIRS,
    Change,
    Layers,
    plan,
)
from moejax.inspection.counterfactuals.result import (
    AS_TRAINED,
    CounterfactualError,
    Counterfactuals,
    Outcome,
    paired_change,
)
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.layer import MoE
from moejax.moe.token_info import TokenInfo
from moejax.seeds import check_seed
from moejax.training.run_directory.text import TextPlaces

REPORT_SECONDS = 15.0  # between two lines on long work

log = logging.getLogger("moejax")


def counterfactuals(
    run: LoadedRun | str | Path,
    *,
    step: int | None = None,
    max_rows: int | None = None,
    kinds: Sequence[str] = KINDS,
    top_k: Sequence[int] | None = None,
    capacity_factors: Sequence[float] = CAPACITY_FACTORS,
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
    places: TextPlaces | None = None,
) -> Counterfactuals:
    """Evaluates a checkpoint as it was trained and under each change of its routing, on one device.

    Kinds of change:

    - "top_k": other numbers of experts per token, with the run's own normalisation.
    - "capacity": evaluation capacity factors, at which choices are dropped.
    - "bias_off": the selection bias at 0.
    - "ablate": each expert of each layer in turn, not selectable (its tokens go to the next in
      rank) and with output 0.
    - "swap": two experts with each other's weights: the busiest with the least used, and
      pairs at random.
    - "merge": two experts with the mean of their weights: the most similar pair, and
      pairs at random.
    - "random": experts drawn uniformly, each of weight 1/K. "uniform": every expert, each of weight
      1/E. In all layers at once, and in each alone; both times the run's `moe.route_scale`.

    Args:
      run: a loaded run, or the run directory.
      step: a saved step, for a run directory; None takes the newest.
      max_rows: validation rows, spread over the split; None takes all.
      kinds: which of the above.
      top_k: numbers of experts per token; None: from 1 to twice the run's, at most E.
      capacity_factors: of evaluation.
      num_pairs: at random, in each layer.
      seed: of those, and of the choice of rows.
      places: where the user says that the run's text is.

    Raises:
      CounterfactualError: a dense run, an unknown kind, or more rows than there are.
    """
    _check_kinds(kinds)
    check_seed("seed", seed)
    if isinstance(run, LoadedRun):
        loaded = run
        if step not in (None, run.step):
            raise CounterfactualError(
                f"step={step} is not that of the loaded run, {run.step}; load_run that step"
            )
    else:
        loaded = load_run(run, step)
    if loaded.config.num_moe_layers == 0:
        raise CounterfactualError(
            "this is a run of a dense model, which routes nothing; give one with experts"
        )
    batches = read_rows(
        loaded.corpus(places),
        max_rows,
        loaded.config.train.batch_size // loaded.config.train.accumulation,
        seed,
    )
    parts = Parts(loaded.model)
    numbers = loaded.config.moe_layers
    trained = [parts.run(batch) for batch in batches]
    load_NE = np.sum(
        [[traffic.load_E for traffic in passed.traffic.values()] for passed in trained], axis=0
    )
    layers = Layers(parts.moes, numbers, load_NE)
    changes, left_out = plan(
        layers,
        kinds,
        top_k=top_k,
        capacity_factors=capacity_factors,
        num_pairs=num_pairs,
        seed=seed,
    )
    log.info("%d changes on %d batches of validation rows", len(changes), len(batches))
    passes = _run_all(parts, batches, changes)
    targets_R = np.concatenate(
        [np.asarray(batch.loss_mask_BL).sum(axis=1) for batch in batches]
    ).astype(np.float64)
    whole = Change(AS_TRAINED, "no change", dict.fromkeys(range(len(parts.moes)), lambda moe: moe))
    outcomes = [
        _outcome(change, passed, trained, targets_R)
        for change, passed in zip([whole, *changes], [trained, *passes], strict=True)
    ]
    return Counterfactuals(
        rows=tuple(outcomes),
        left_out=left_out,
        step=loaded.step,
        num_rows=int(np.count_nonzero(targets_R)),
        num_targets=int(targets_R.sum()),
        layers=tuple(numbers),
        num_experts=loaded.config.moe.num_choices,
        top_k=tuple(interventions.chosen_per_token(moe) for moe in parts.moes),
    )


def read_rows(corpus: Corpus, max_rows: int | None, batch_size: int, seed: int = 0) -> list[Batch]:
    """Validation rows, spread over the split, in batches of one shape: the last is filled up with padding.

    Raises:
      CounterfactualError: there are not so many.
    """
    rows = corpus.rows("validation")
    if max_rows is not None and not 1 <= max_rows <= len(rows):
        raise CounterfactualError(
            f"{max_rows} rows must be between 1 and the {len(rows)} of the validation split; leave the number out for "
            "all of them"
        )
    chosen_R = spread_rows(len(rows), max_rows, seed)
    batches = []
    for start in range(0, len(chosen_R), batch_size):
        read = [rows[int(index)] for index in chosen_R[start : start + batch_size]]
        read += [empty_row(corpus.seq_len)] * (batch_size - len(read))
        batches.append(to_batch({name: np.stack([row[name] for row in read]) for name in read[0]}))
    return batches


class Traffic(NamedTuple):
    """Sums over a batch's tokens in one MoE layer: tokens, choices, dropped choices, weights, choices by expert."""

    num_tokens: Any
    num_choices: Any
    dropped: Any
    gate_mass: Any
    load_E: Any


class Passed(NamedTuple):
    """A batch after a pass: cross-entropy of each row in nats, and the traffic of the MoE layers that were run."""

    nats_B: Float[np.ndarray, "B"]
    traffic: dict[int, Traffic]


class Residuals(NamedTuple):
    """A batch on its way through the layers as trained.

    Attributes:
      context: what all layers share.
      before: the residual stream before each layer, and behind the last.
      traffic: of each MoE layer.
    """

    context: Context
    before: list[jax.Array]
    traffic: dict[int, Traffic]


class Parts:
    """A model in single layers, each of which can be changed.

    Holds the layers' weights a second time beside the model's own.
    """

    def __init__(self, model: Decoder):
        self.whole = nnx.split(model)
        blocks: list[Block] = [block for block, _ in model.walk()]
        self.blocks = [nnx.split(block) for block in blocks]
        self.places = [index for index, block in enumerate(blocks) if block.is_moe]
        self.moes: list[MoE] = [blocks[index].moe for index in self.places]
        if any(moe.is_placed for moe in self.moes):
            raise CounterfactualError(
                "experts of this model were placed elsewhere; load the run anew"
            )

    def run(self, batch: Batch) -> Passed:
        """A pass as trained."""
        residuals = self.begin(batch)
        return self._end(batch, residuals.before[-1], residuals.traffic)

    def begin(self, batch: Batch) -> Residuals:
        """A pass as trained that keeps the residual stream before every layer."""
        x_BLD, context = _embed(*self.whole, batch)
        before, found = [x_BLD], {}
        for index, block in enumerate(self.blocks):
            x_BLD, traffic = _apply(*block, x_BLD, context)
            before.append(x_BLD)
            if traffic is not None:
                found[self.places.index(index)] = traffic
        return Residuals(context, before, found)

    def run_changed(
        self, batch: Batch, residuals: Residuals, surgeries: Mapping[int, interventions.Surgery]
    ) -> Passed:
        """A pass from the first changed layer on."""
        first = self.places[min(surgeries)]
        x_BLD, found = residuals.before[first], {}
        for index in range(first, len(self.blocks)):
            graphdef, state = self.blocks[index]
            layer = self.places.index(index) if index in self.places else -1
            if layer in surgeries:
                block = nnx.merge(graphdef, state)
                block.moe = surgeries[layer](block.moe)
                graphdef, state = nnx.split(block)
            x_BLD, traffic = _apply(graphdef, state, x_BLD, residuals.context)
            if layer in surgeries:
                found[layer] = traffic
        return self._end(batch, x_BLD, found)

    def _end(self, batch: Batch, x_BLD: jax.Array, traffic: dict[int, Traffic]) -> Passed:
        return Passed(*jax.device_get((_count_nats(*self.whole, x_BLD, batch), traffic)))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[jax.Array, Context]:
    info = TokenInfo(jnp.asarray(batch.segments_BL) > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    return nnx.merge(graphdef, state).embed(batch.tokens_BL), context


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, context: Context):
    x_BLD, stats, _ = nnx.merge(graphdef, state)(x_BLD, context)
    if stats is None:
        return x_BLD, None
    num_choices = stats.assignments_E.sum()
    return x_BLD, Traffic(
        stats.num_tokens, num_choices, stats.dropped, stats.gate_mass, stats.assignments_E
    )


@functools.partial(jax.jit, static_argnums=0)
def _count_nats(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, batch: Batch
) -> jax.Array:
    logits_BLV = nnx.merge(graphdef, state).unembed(x_BLD)
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return jnp.where(batch.loss_mask_BL, nats_BL, 0.0).sum(axis=1)


def _run_all(
    parts: Parts, batches: Sequence[Batch], changes: Sequence[Change]
) -> list[list[Passed]]:
    """The passes of each change over all batches."""
    passes: list[list[Passed]] = [[] for _ in changes]
    started = reported = time.monotonic()
    for number, (batch, residuals) in enumerate(_with_residuals(parts, batches)):
        for index, change in enumerate(changes):
            passes[index].append(parts.run_changed(batch, residuals, change.surgeries))
            now = time.monotonic()
            if now - reported > REPORT_SECONDS:
                log.info(
                    _progress(
                        number * len(changes) + index + 1, len(changes), len(batches), now - started
                    )
                )
                reported = now
        if number == 0:  # the first batch compiles
            started = time.monotonic()
    return passes


def _progress(done: int, num_changes: int, num_batches: int, seconds: float) -> str:
    """How far it is; `seconds` since the first batch was done, or since the start until then."""
    if done <= num_changes:
        return f"batch 1 of {num_batches}: {done} of {num_changes} changes; what is new is compiled"
    rest = (num_changes * num_batches - done) / (done - num_changes)
    return (
        f"batch {(done - 1) // num_changes + 1} of {num_batches}; about {seconds * rest:.0f} s left"
    )


def _with_residuals(parts: Parts, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Residuals]]:
    for batch in batches:
        yield batch, parts.begin(batch)


def _outcome(change: Change, passed: list[Passed], trained: list[Passed], targets_R) -> Outcome:
    nats_R, trained_R = (
        np.concatenate([p.nats_B for p in batch]).astype(np.float64) for batch in (passed, trained)
    )
    difference, standard_error = paired_change(nats_R, trained_R, targets_R)
    sums = [
        jax.tree.map(lambda *x: np.sum(x), *(p.traffic[layer] for p in passed))
        for layer in passed[0].traffic
    ]
    return Outcome(
        kind=change.kind,
        what=change.what,
        layer=change.layer,
        experts=change.experts,
        setting=change.setting,
        loss=float(nats_R.sum() / targets_R.sum()),
        change=difference,
        standard_error=standard_error,
        gate_mass=float(
            np.mean([traffic.gate_mass / max(traffic.num_tokens, 1) for traffic in sums])
        ),
        dropped=float(np.mean([traffic.dropped / max(traffic.num_choices, 1) for traffic in sums])),
    )


def _check_kinds(kinds: Sequence[str]) -> None:
    if not kinds:
        raise CounterfactualError(f"no kind of change is named; use some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise CounterfactualError(
                f"{kind!r} must be one of {', '.join(KINDS)}; the nearest is {nearest(kind, KINDS)}"
            )
