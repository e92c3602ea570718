"""Evaluates a checkpoint under other routing: the same validation rows, one intervention at a time.

All interventions see the same tokens, so that their losses can be compared row by row; `passes`
runs the model.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from moejax.config import nearest
from moejax.data import Batch, Corpus
from moejax.data.batches import to_batch
from moejax.data.packing import empty_row
from moejax.inference.load import LoadedRun, load_run
from moejax.inspection.analysis.trace import spread_rows
from moejax.inspection.counterfactuals import interventions
from moejax.inspection.counterfactuals.interventions import LayerEdit
from moejax.inspection.counterfactuals.passes import Parts, Passed, Residuals, Traffic
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
from moejax.inspection.counterfactuals.stacks import most_at_once, stack_interventions
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

    Fewer rows than a batch has are a smaller one. Of several batches, the last one is filled up
    with padding.

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
    batch_size = min(batch_size, len(chosen_R))
    batches = []
    for start in range(0, len(chosen_R), batch_size):
        read = [rows[int(index)] for index in chosen_R[start : start + batch_size]]
        read += [empty_row(corpus.seq_len)] * (batch_size - len(read))
        names = read[0].keys()
        batches.append(to_batch({name: np.stack([row[name] for row in read]) for name in names}))
    return batches


def _run_all(
    parts: Parts, batches: Sequence[Batch], planned: Sequence[Intervention]
) -> list[list[Passed]]:
    """Returns the passes of each intervention over all batches."""
    passes: list[list[Passed]] = [[] for _ in planned]
    stacks = stack_interventions(planned, most_at_once(parts, batches[0]))
    started = reported = time.monotonic()
    done = 0
    for batch, residuals in _with_residuals(parts, batches):
        for stack in stacks:
            done += len(set(stack.places))
            of_stack = parts.run_edited(batch, residuals, stack.edits, len(stack.places))
            for place, passed in dict(zip(stack.places, of_stack, strict=True)).items():
                passes[place].append(passed)
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
    edits = dict.fromkeys(range(len(parts.moes)), LayerEdit())
    return Intervention(AS_TRAINED, "no change", edits)


def _check_kinds(kinds: Sequence[str]) -> None:
    if not kinds:
        raise CounterfactualError(f"no kind of change is named; use some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise CounterfactualError(
                f"{kind!r} must be one of {', '.join(KINDS)}; the nearest is {nearest(kind, KINDS)}"
            )
