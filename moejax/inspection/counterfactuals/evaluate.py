"""Evaluates a checkpoint under other routing: the same validation rows, one intervention at a time.

The model is run layer by layer. An intervention concerns few layers: those before it are run once
for all interventions, and a layer with other weights or another blocked expert is the same program
with other arguments, so that the ablation of every expert of every layer compiles nothing again.
"""

import difflib
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
from jaxtyping import Float, Int

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
    Intervention,
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
from moejax.moe.layer import MoE, TokenInfo
from moejax.seeds import check_seed
from moejax.training.run_directory.text import TextPlaces

REPORT_SECONDS = 15.0  # between two lines about a long evaluation

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
    """Evaluates a checkpoint as trained and under each intervention on its routing, on one device.

    Kinds of intervention:

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
      seed: of those pairs, and of the choice of rows.
      places: where the user says that the run's text is.

    Raises:
      CounterfactualError: a dense run, an unknown kind, or more rows than there are.
    """
    _check_kinds(kinds)
    check_seed("seed", seed)
    loaded = _load(run, step)
    train = loaded.config.train
    batch_size = train.batch_size // train.accumulation
    batches = read_rows(loaded.corpus(places), max_rows, batch_size, seed)
    parts = Parts(loaded.model)
    trained = [parts.run(batch) for batch in batches]
    planned, left_out = plan(
        Layers(parts.moes, loaded.config.moe_layers, _total_load(trained)),
        kinds,
        top_k=top_k,
        capacity_factors=capacity_factors,
        num_pairs=num_pairs,
        seed=seed,
    )
    log.info("%d changes on %d batches of validation rows", len(planned), len(batches))
    passes = _run_all(parts, batches, planned)
    targets_R = _count_targets(batches)
    outcomes = [_outcome(_no_intervention(parts), trained, trained, targets_R)]
    for intervention, passed in zip(planned, passes, strict=True):
        outcomes.append(_outcome(intervention, passed, trained, targets_R))
    return Counterfactuals(
        rows=tuple(outcomes),
        left_out=left_out,
        step=loaded.step,
        num_rows=int(np.count_nonzero(targets_R)),
        num_targets=int(targets_R.sum()),
        layers=tuple(loaded.config.moe_layers),
        num_experts=loaded.config.moe.num_choices,
        top_k=tuple(interventions.chosen_per_token(moe) for moe in parts.moes),
    )


def _load(run: LoadedRun | str | Path, step: int | None) -> LoadedRun:
    """Returns the run with its weights, and checks that it has experts."""
    if not isinstance(run, LoadedRun):
        loaded = load_run(run, step)
    elif step in (None, run.step):
        loaded = run
    else:
        raise CounterfactualError(
            f"step={step} is not that of the loaded run, {run.step}; load_run that step"
        )
    if loaded.config.num_moe_layers == 0:
        raise CounterfactualError(
            "this is a run of a dense model, which routes nothing; give one with experts"
        )
    return loaded


def read_rows(corpus: Corpus, max_rows: int | None, batch_size: int, seed: int = 0) -> list[Batch]:
    """Reads validation rows, spread over the split, in batches of one shape.

    The last batch is filled up with padding.

    Raises:
      CounterfactualError: there are not that many.
    """
    rows = corpus.rows("validation")
    if max_rows is not None and not 1 <= max_rows <= len(rows):
        raise CounterfactualError(
            f"{max_rows} rows must be between 1 and the {len(rows)} of the validation split; "
            "leave the number out for all of them"
        )
    chosen_R = spread_rows(len(rows), max_rows, seed)
    batches = []
    for start in range(0, len(chosen_R), batch_size):
        read = [rows[int(index)] for index in chosen_R[start : start + batch_size]]
        read += [empty_row(corpus.seq_len)] * (batch_size - len(read))
        names = read[0].keys()
        batches.append(to_batch({name: np.stack([row[name] for row in read]) for name in names}))
    return batches


class Traffic(NamedTuple):
    """Sums over a batch's tokens in one MoE layer.

    Attributes:
      num_tokens: without padding.
      num_choices: experts that were chosen for them.
      dropped: choices that found no slot.
      gate_mass: sum of combine weights.
      load_E: choices by expert.
    """

    num_tokens: Any
    num_choices: Any
    dropped: Any
    gate_mass: Any
    load_E: Any


class Passed(NamedTuple):
    """A batch after a pass.

    Attributes:
      nats_B: cross-entropy of each row.
      traffic: of the edited MoE layers, all of them in a pass as trained.
    """

    nats_B: Float[np.ndarray, "B"]
    traffic: dict[int, Traffic]


class Residuals(NamedTuple):
    """A batch on its way through the layers as trained.

    Attributes:
      context: what all layers share.
      before: the residual stream before each layer, and after the last.
      traffic: of each MoE layer.
    """

    context: Context
    before: list[jax.Array]
    traffic: dict[int, Traffic]


class Parts:
    """A model in single layers, each of which can be edited.

    Holds a second copy of the layers' weights next to the model's own.
    """

    def __init__(self, model: Decoder):
        self.model = nnx.split(model)
        blocks: list[Block] = [block for block, _ in model.walk()]
        self.blocks = [nnx.split(block) for block in blocks]
        self.places = [index for index, block in enumerate(blocks) if block.is_moe]
        self.moes: list[MoE] = [blocks[index].moe for index in self.places]
        if any(moe.is_placed for moe in self.moes):
            raise CounterfactualError(
                "experts of this model were placed elsewhere; load the run again"
            )

    def run(self, batch: Batch) -> Passed:
        """Runs a batch as trained."""
        residuals = self.begin(batch)
        return self._end(batch, residuals.before[-1], residuals.traffic)

    def begin(self, batch: Batch) -> Residuals:
        """Runs a batch as trained, and keeps the residual stream before every layer."""
        x_BLD, context = _embed(*self.model, batch)
        before = [x_BLD]
        traffic_by_layer = {}
        for index, (graphdef, state) in enumerate(self.blocks):
            x_BLD, traffic = _apply(graphdef, state, x_BLD, context)
            before.append(x_BLD)
            if traffic is not None:
                traffic_by_layer[self.places.index(index)] = traffic
        return Residuals(context, before, traffic_by_layer)

    def run_edited(
        self, batch: Batch, residuals: Residuals, edits: Mapping[int, interventions.LayerEdit]
    ) -> Passed:
        """Runs a batch from the first edited layer on.

        Args:
          batch: as in `begin`.
          residuals: what `begin` returned for it.
          edits: by MoE layer, counted from 0.
        """
        edits_by_block = {self.places[layer]: edit for layer, edit in edits.items()}
        first = min(edits_by_block)
        x_BLD = residuals.before[first]
        traffic_by_layer = {}
        for index in range(first, len(self.blocks)):
            graphdef, state = self.blocks[index]
            edit = edits_by_block.get(index)
            if edit is not None:
                graphdef, state = _edit_block(graphdef, state, edit)
            x_BLD, traffic = _apply(graphdef, state, x_BLD, residuals.context)
            if edit is not None:
                traffic_by_layer[self.places.index(index)] = traffic
        return self._end(batch, x_BLD, traffic_by_layer)

    def _end(self, batch: Batch, x_BLD: jax.Array, traffic: dict[int, Traffic]) -> Passed:
        nats_B = _count_nats(*self.model, x_BLD, batch)
        return Passed(*jax.device_get((nats_B, traffic)))


def _edit_block(
    graphdef: nnx.GraphDef, state: nnx.State, edit: interventions.LayerEdit
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a block, split, with its MoE layer edited."""
    block = nnx.merge(graphdef, state)
    block.moe = edit(block.moe)
    return nnx.split(block)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[jax.Array, Context]:
    info = TokenInfo(jnp.asarray(batch.segments_BL) > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    return nnx.merge(graphdef, state).embed(batch.tokens_BL), context


@functools.partial(jax.jit, static_argnums=0)
def _apply(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, context: Context
) -> tuple[jax.Array, Traffic | None]:
    x_BLD, stats, _ = nnx.merge(graphdef, state)(x_BLD, context)
    if stats is None:
        return x_BLD, None
    traffic = Traffic(
        num_tokens=stats.num_tokens,
        num_choices=stats.assignments_E.sum(),
        dropped=stats.dropped,
        gate_mass=stats.gate_mass,
        load_E=stats.assignments_E,
    )
    return x_BLD, traffic


@functools.partial(jax.jit, static_argnums=0)
def _count_nats(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, batch: Batch
) -> jax.Array:
    logits_BLV = nnx.merge(graphdef, state).unembed(x_BLD)
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return jnp.where(batch.loss_mask_BL, nats_BL, 0.0).sum(axis=1)


def _run_all(
    parts: Parts, batches: Sequence[Batch], planned: Sequence[Intervention]
) -> list[list[Passed]]:
    """Returns the passes of each intervention over all batches."""
    passes: list[list[Passed]] = [[] for _ in planned]
    started = reported = time.monotonic()
    done = 0
    for batch, residuals in _with_residuals(parts, batches):
        for of_intervention, intervention in zip(passes, planned, strict=True):
            of_intervention.append(parts.run_edited(batch, residuals, intervention.edits))
            done += 1
            now = time.monotonic()
            if now - reported > REPORT_SECONDS:
                log.info(_progress(done, len(planned), len(batches), now - started))
                reported = now
        if done == len(planned):  # the first batch compiles
            started = time.monotonic()
    return passes


def _progress(done: int, num_changes: int, num_batches: int, seconds: float) -> str:
    """Says how much is done.

    Args:
      done: interventions on batches, of `num_changes * num_batches`.
      num_changes: interventions.
      num_batches: of validation rows.
      seconds: since the first batch was done, or since the start until then.
    """
    if done <= num_changes:
        return f"batch 1 of {num_batches}: {done} of {num_changes} changes; what is new is compiled"
    done_since = done - num_changes
    to_do = num_changes * num_batches - done
    seconds_left = seconds * (to_do / done_since)
    batch = (done - 1) // num_changes + 1
    return f"batch {batch} of {num_batches}; about {seconds_left:.0f} s left"


def _with_residuals(parts: Parts, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Residuals]]:
    for batch in batches:
        yield batch, parts.begin(batch)


def _outcome(
    intervention: Intervention,
    passed: Sequence[Passed],
    trained: Sequence[Passed],
    targets_R: Float[np.ndarray, "R"],
) -> Outcome:
    nats_R = _nats_of_rows(passed)
    change, standard_error = paired_change(nats_R, _nats_of_rows(trained), targets_R)
    sums = [_total_traffic(passed, layer) for layer in passed[0].traffic]
    gate_masses = [traffic.gate_mass / max(traffic.num_tokens, 1) for traffic in sums]
    dropped_shares = [traffic.dropped / max(traffic.num_choices, 1) for traffic in sums]
    return Outcome(
        kind=intervention.kind,
        what=intervention.what,
        layer=intervention.layer,
        experts=intervention.experts,
        setting=intervention.setting,
        loss=float(nats_R.sum() / targets_R.sum()),
        change=change,
        standard_error=standard_error,
        gate_mass=float(np.mean(gate_masses)),
        dropped=float(np.mean(dropped_shares)),
    )


def _nats_of_rows(passes: Sequence[Passed]) -> Float[np.ndarray, "R"]:
    return np.concatenate([passed.nats_B for passed in passes]).astype(np.float64)


def _total_traffic(passes: Sequence[Passed], layer: int) -> Traffic:
    """Returns the traffic of one MoE layer over all batches; each field is one number."""
    of_layer = [passed.traffic[layer] for passed in passes]
    return jax.tree.map(lambda *x: np.sum(x), *of_layer)


def _total_load(passes: Sequence[Passed]) -> Int[np.ndarray, "N E"]:
    """Returns the choices of each expert over all batches."""
    loads = []
    for passed in passes:
        loads.append([traffic.load_E for traffic in passed.traffic.values()])
    return np.sum(loads, axis=0)


def _count_targets(batches: Sequence[Batch]) -> Float[np.ndarray, "R"]:
    """Returns the predicted tokens of each row; 0 for rows of padding."""
    counts = [np.asarray(batch.loss_mask_BL).sum(axis=1) for batch in batches]
    return np.concatenate(counts).astype(np.float64)


def _no_intervention(parts: Parts) -> Intervention:
    """Returns the intervention that leaves every layer as it was trained."""
    edits = dict.fromkeys(range(len(parts.moes)), lambda moe: moe)
    return Intervention(AS_TRAINED, "no change", edits)


def _check_kinds(kinds: Sequence[str]) -> None:
    if not kinds:
        raise CounterfactualError(f"no kind of change is named; use some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
            raise CounterfactualError(
                f"{kind!r} must be one of {', '.join(KINDS)}; the nearest is {near}"
            )
