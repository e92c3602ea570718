"""Records of a sweep: a flat row for each arm that has ended, and all rows in one file.

An arm's row is made from its run directory and its entry in `sweep.json`, and written into the run
directory as `record.json`: all of it or nothing, so that the file's presence says that the arm has
ended. `collect` joins the rows into `records.jsonl` and `records.parquet`, for notebooks. Nothing
read here is executed. See `moejax.sweeps.tables` for comparing rows, and
`moejax.sweeps.store.record_files` for how the joint files are written.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection.runs.run import Run, RunError, open_run
from moejax.paths import resolve_path
from moejax.strict_json import to_json
from moejax.sweeps.store.record_files import (
    RecordError,
    check_inside,
    read_jsonl,
    read_parquet,
    read_text,
    write_jsonl,
    write_parquet,
)
from moejax.sweeps.store.row_check import STATUSES, check_definition, check_entry, check_row
from moejax.sweeps.tables import MATCHED, OVERRIDE, frame_of
from moejax.training.health.alarms import AlarmFileError, read_alarms
from moejax.training.health.speed import SPEED, median_speed
from moejax.training.run_directory.layout import write_json

Row = dict[str, Any]

SWEEP_FILE, RECORD_FILE = "sweep.json", "record.json"
JSONL_FILE, PARQUET_FILE = "records.jsonl", "records.parquet"
TAIL = 0.1
"""The fraction of the planned steps, at the end of an arm, that its `tail/` values are means of."""

TAIL_PREFIXES = ("loss/", "moe/")
FIRST_COLUMNS = ("arm", "config_hash", "status", "error")


def record_of(
    workdir: str | Path,
    entry: Mapping[str, Any],
    *,
    status: str,
    error: str | None,
    wall_s: float | None,
    step_s: float | None,
    packed: int,
) -> Row:
    """Returns the row of an arm that has ended.

    An arm that is not done has a record even if what it logged is damaged: how it ended is known.

    A value that is not finite or unknown is None. `final/` values are those of the last evaluation
    and of the last logged interval: None if they were not finite then, even if an earlier one was.

    Args:
      workdir: the arm's run directory; one that failed early may lack any file.
      entry: of the arm, from `arms` in `sweep.json`.
      status: one of `STATUSES`.
      error: why it failed; its first line is kept.
      wall_s: seconds that its training took: in a pack of A arms, the pack's seconds over A.
      step_s: median seconds of a step, in a pack over A as well.
      packed: arms in its last pack; 1 if it trained alone.

    Raises:
      RecordError: an unknown status, an entry that lacks a key, or a damaged file of the run of an
        arm that is done.
    """
    if status not in STATUSES:
        raise RecordError(f"status={status!r} must be one of {', '.join(STATUSES)}")
    workdir = Path(workdir)
    check_entry(entry, f"the entry of {workdir.name}")
    try:
        run = open_run(workdir) if (workdir / "config.json").exists() else None
        has_metrics = (workdir / "metrics.jsonl").exists()
        measured = _measured(run if has_metrics else None, entry, status)
        alarms = [line["rule"] for line in read_alarms(workdir) if line["state"] == "on"]
    except (RunError, AlarmFileError) as damage:
        if status == "done":
            raise RecordError(str(damage)) from damage
        run = None
        measured = _measured(None, entry, status)
        alarms = []
        error = f"{_first_line(error or status)}; what it logged is not in its record: {damage}"
    row: Row = {
        "arm": entry["id"],
        "config_hash": entry["config_hash"],
        "status": status,
        "error": None if error is None else _first_line(error),
        **_axes(entry),
        **_costs(entry, measured["tokens"]),
        **_origin(run),
        **measured,
        "wall_s": wall_s,
        "step_s": step_s,
        "packed": packed,
        "alarms": len(alarms),
        "alarm_rules": json.dumps(list(dict.fromkeys(alarms))),
    }
    return {key: _finite_or_none(value) for key, value in row.items()}


def _axes(entry: Mapping[str, Any]) -> Row:
    """Returns what the sweep varies, and what matching changed for it."""
    overrides = {OVERRIDE + key: value for key, value in entry["overrides"].items()}
    return overrides | {MATCHED + key: value for key, value in entry["matched"].items()}


def _costs(entry: Mapping[str, Any], tokens: int | None) -> Row:
    """Returns the seed, and what was counted from the configuration."""
    per_token = entry.get("flops_per_token")
    if entry["config"].get("schedule", {}).get("top_k", "constant") != "constant":
        per_token = None  # it changes during the run
    total = None
    if per_token is not None and tokens is not None:
        total = float(per_token) * tokens
    return {
        "seed": entry["config"].get("train", {}).get("seed"),
        "params_total": entry.get("params_total"),
        "params_active": entry.get("params_active"),
        "flops_per_token": per_token,
        "flops_total": total,
    }


def _origin(run: Run | None) -> Row:
    """Returns the code, versions, device and command of the run."""
    if run is None:
        return dict.fromkeys(("git_commit", "versions", "device", "command"))
    return {
        "git_commit": run.git_commit,
        "versions": json.dumps(run.versions),
        "device": run.device,
        "command": run.command,
    }


def _first_line(error: str) -> str:
    """Returns the first line of a message.

    What UTF-8 cannot hold, such as undecoded bytes of a file's name, is replaced.
    """
    first = next(iter(error.strip().splitlines()), "")
    return first.encode("utf-8", "replace").decode()


def _measured(run: Run | None, entry: Mapping[str, Any], status: str) -> Row:
    """Returns what the arm logged.

    Args:
      run: the arm's; None if it logged nothing.
      entry: of the arm.
      status: how it ended.
    """
    train = entry["config"].get("train", {})
    planned = train.get("num_steps")
    row: Row = {
        "steps": 0,
        "steps_planned": planned,
        "fraction": 0.0 if planned else None,
        "tokens": None,
    }
    if run is None:
        return row | {"evaluations": "[]"}
    row["steps"] = run.last_step
    row["fraction"] = run.last_step / planned if planned else None
    tokens = run.last("tokens")
    row["tokens"] = None if tokens is None else int(tokens)
    row |= _final_values(run, status)
    row |= _best_evaluation(run)
    # At least one interval, so that short arms have means, too.
    row |= _tail_means(run, window=max(TAIL * (planned or 0), train.get("log_every", 1)))
    row[f"median/{SPEED}"] = median_speed(run.series(SPEED)[1])
    row["evaluations"] = to_json(_evaluations(run, planned))
    return row


def _final_values(run: Run, status: str) -> Row:
    """Returns the values of the last evaluation and of the last logged interval.

    None where that evaluation or interval has no value.
    """
    interval_steps, _ = run.series("tokens")
    last_interval = interval_steps[-1] if interval_steps.size else None
    evaluated = [run.series(key)[0][-1] for key in run.keys if key.startswith("eval/")]
    last_evaluation = max(evaluated, default=None)
    if status == "done" and last_evaluation != run.last_step:
        last_evaluation = None  # at the end nothing was finite
    last_steps = {"eval": last_evaluation, "loss": last_interval}
    row: Row = {}
    for key in run.keys:
        section = key.partition("/")[0]
        if section in last_steps:
            steps, values = run.series(key)
            is_last = steps[-1] == last_steps[section]
            row[f"final/{key}"] = float(values[-1]) if is_last else None
    return row


def _best_evaluation(run: Run) -> Row:
    """Returns the lowest loss of the evaluations with its step; nothing if no loss is finite."""
    steps, losses = run.series("eval/loss")
    is_finite = np.isfinite(losses)
    if not is_finite.any():
        return {}
    best = int(np.argmin(np.where(is_finite, losses, np.inf)))
    return {"best/eval/loss": float(losses[best]), "best/step": int(steps[best])}


def _tail_means(run: Run, window: float) -> Row:
    """Returns means over the intervals that ended within `window` steps of the last one.

    None where no value was finite.
    """
    row: Row = {}
    for key in run.keys:
        if key.startswith(TAIL_PREFIXES):
            steps, values = run.series(key)
            values = values[(steps > run.last_step - window) & np.isfinite(values)]
            row[f"tail/{key}"] = float(values.mean()) if values.size else None
    return row


def _evaluations(run: Run, planned: int | None) -> list[list[float | None]]:
    """Returns the fraction of the schedule, the step, the loss and the bits of each evaluation."""
    bits_by_step = _by_step(run, "eval/bits_per_byte")
    evaluations = []
    for step, loss in _by_step(run, "eval/loss").items():
        fraction = step / planned if planned else None
        bits = bits_by_step.get(step)
        evaluation = [fraction, step, _finite_or_none(loss), _finite_or_none(bits)]
        evaluations.append(evaluation)
    return evaluations


def _by_step(run: Run, key: str) -> dict[int, float]:
    """Returns a metric's values by step."""
    steps, values = run.series(key)
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(workdir: str | Path, row: Mapping[str, Any]) -> Path:
    """Writes an arm's row into its run directory, which is created if need be.

    The file is written in one rename: there is all of it or none.
    """
    path = Path(workdir) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(row))
    return path


def read_record(workdir: str | Path) -> Row | None:
    """Returns the row of an arm; None if the arm has not ended.

    Raises:
      RecordError: the file is damaged.
    """
    path = Path(workdir) / RECORD_FILE
    remedy = "remove it and run the sweep again: it makes the row again"
    try:
        row = _read_json(path, remedy)
    except FileNotFoundError:
        return None
    check_row(row, str(path), remedy)
    return row


def read_definition(directory: str | Path) -> dict[str, Any]:
    """Returns what a sweep is to run: `sweep.json`.

    Raises:
      RecordError: it is missing or damaged.
    """
    path = Path(directory) / SWEEP_FILE
    remedy = "restore it, or start the sweep in another directory"
    try:
        definition = _read_json(path, remedy)
    except FileNotFoundError as error:
        raise RecordError(
            f"{path} is missing; `moejax sweep` writes it, so give the directory of a sweep"
        ) from error
    check_definition(definition, str(path), remedy)
    return definition


def _read_json(path: Path, remedy: str) -> Any:
    """Returns what a file holds; raises `FileNotFoundError` if there is none."""
    try:
        return json.loads(read_text(path))
    except (RecordError, FileNotFoundError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged ({error}); {remedy}") from error


def collect(directory: str | Path) -> list[Row]:
    """Writes the rows of all arms that have ended to both joint files, and returns them.

    They are in the order of `sweep.json`, and have its axes: an arm may have ended before the sweep
    got another axis.

    Raises:
      RecordError: `sweep.json` or a row is damaged, or a row is of another arm.
    """
    directory = resolve_path(directory)
    rows = []
    for entry in read_definition(directory)["arms"]:
        workdir = directory / "arms" / entry["id"]
        check_inside(directory, workdir)
        row = read_record(workdir)
        if row is None:
            continue
        if (row["arm"], row.get("config_hash")) != (entry["id"], entry["config_hash"]):
            raise RecordError(
                f"{workdir / RECORD_FILE} is of arm {row['arm']} "
                f"with config_hash {row.get('config_hash')}, not {entry['config_hash']}; "
                f"remove the folder {workdir} and run the sweep again"
            )
        first = {key: row.get(key) for key in FIRST_COLUMNS}
        axes = {key: _finite_or_none(value) for key, value in _axes(entry).items()}
        rest = {key: value for key, value in row.items() if not key.startswith((OVERRIDE, MATCHED))}
        rows.append({**first, **axes, **rest})
    write_jsonl(directory / JSONL_FILE, rows)
    write_parquet(directory / PARQUET_FILE, rows)
    return rows


def read_records(directory: str | Path) -> pd.DataFrame:
    """Returns the joint file of a sweep as a table; see `moejax.sweeps.tables.frame_of`.

    Args:
      directory: of the sweep: `records.jsonl` is read, or `records.parquet` if only that is there.

    Raises:
      RecordError: there is neither of the two, or the one that is read is damaged.
    """
    directory = resolve_path(directory)
    jsonl, parquet = directory / JSONL_FILE, directory / PARQUET_FILE
    if jsonl.exists():
        rows = read_jsonl(jsonl)
        path = jsonl
    elif parquet.exists():
        rows = read_parquet(parquet)
        path = parquet
    else:
        raise RecordError(
            f"{directory} has neither {JSONL_FILE} nor {PARQUET_FILE}; "
            "give the directory of a sweep"
        )
    remedy = "remove the file and run the sweep again: it joins the rows again"
    for number, row in enumerate(rows, start=1):
        check_row(row, f"{path}: row {number}", remedy)
    return frame_of(rows)
