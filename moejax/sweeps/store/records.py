"""Records of a sweep: one flat row for each arm that has ended, and all rows in one file for notebooks.

An arm's row is made from its run directory and its entry in `sweep.json`, and written beside the
run as `record.json`: whole or not at all, so that the file's presence says that the arm has ended.
`collect` joins the rows into `records.jsonl` and `records.parquet`. Nothing read here is executed.
See `moejax.sweeps.tables` for comparing rows, and `moejax.sweeps.store.record_files` for how the
joint files are written.
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
TAIL = 0.1  # of the planned steps: the window at the end of an arm that its `tail/` values are means of
TAIL_PREFIXES = ("loss/", "moe/")
ENDING = ("arm", "config_hash", "status", "error")  # the first columns


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
    """The row of an arm that has ended.

    An arm that is not done has a record even if what it logged is damaged: that it ended
    so is known.

    A value that is not finite or unknown is None. `final/` values are those of the last evaluation
    and of the last logged interval: None if they were not finite then, even if an earlier one was.

    Args:
      workdir: the arm's run directory; one that failed early may lack any file.
      entry: of the arm, from `arms` in `sweep.json`.
      status: one of `STATUSES`.
      error: why it failed; its first line is kept.
      wall_s: seconds that its training took: of a pack of A arms, the pack's over A.
      step_s: median seconds of a step, likewise.
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
        measured = _measured(run if (workdir / "metrics.jsonl").exists() else None, entry, status)
        begun = [line["rule"] for line in read_alarms(workdir) if line["state"] == "on"]
    except (RunError, AlarmFileError) as damage:
        if status == "done":
            raise RecordError(str(damage)) from damage
        run, measured, begun = None, _measured(None, entry, status), []
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
        "alarms": len(begun),
        "alarm_rules": json.dumps(list(dict.fromkeys(begun))),
    }
    return {key: _finite(value) for key, value in row.items()}


def _axes(entry: Mapping[str, Any]) -> Row:
    """What the sweep varies, and what matching changed for it."""
    overrides = {OVERRIDE + key: value for key, value in entry["overrides"].items()}
    return overrides | {MATCHED + key: value for key, value in entry["matched"].items()}


def _costs(entry: Mapping[str, Any], tokens: int | None) -> Row:
    """The seed, and what was counted from the configuration."""
    per_token = entry.get("flops_per_token")
    if entry["config"].get("schedule", {}).get("top_k", "constant") != "constant":
        per_token = None  # it changes as the run goes on
    return {
        "seed": entry["config"].get("train", {}).get("seed"),
        "params_total": entry.get("params_total"),
        "params_active": entry.get("params_active"),
        "flops_per_token": per_token,
        "flops_total": None if per_token is None or tokens is None else float(per_token) * tokens,
    }


def _origin(run: Run | None) -> Row:
    """Code, versions, device and command of the run."""
    return {
        "git_commit": None if run is None else run.git_commit,
        "versions": None if run is None else json.dumps(run.versions),
        "device": None if run is None else run.device,
        "command": None if run is None else run.command,
    }


def _first_line(error: str) -> str:
    """Without what UTF-8 cannot hold, such as the undecoded bytes of a file's name."""
    return next(iter(error.strip().splitlines()), "").encode("utf-8", "replace").decode()


def _measured(run: Run | None, entry: Mapping[str, Any], status: str) -> Row:
    """What the arm logged; None for all of it if it logged nothing."""
    train = entry["config"].get("train", {})
    planned, interval = train.get("num_steps"), train.get("log_every", 1)
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
    row |= {f"final/{key}": value for key, value in _final_values(run, status).items()}
    steps, losses = run.series("eval/loss")
    is_finite = np.isfinite(losses)
    if is_finite.any():
        best = int(np.argmin(np.where(is_finite, losses, np.inf)))
        row |= {"best/eval/loss": float(losses[best]), "best/step": int(steps[best])}
    row |= {
        f"tail/{key}": value
        for key, value in _tail_means(run, max(TAIL * (planned or 0), interval)).items()
    }
    row[f"median/{SPEED}"] = median_speed(run.series(SPEED)[1])
    bits = dict(zip(*(values.tolist() for values in run.series("eval/bits_per_byte")), strict=True))
    evaluations = [
        [step / planned if planned else None, step, _finite(loss), _finite(bits.get(step))]
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True)
    ]
    return row | {"evaluations": to_json(evaluations)}


def _final_values(run: Run, status: str) -> dict[str, float | None]:
    """Values of the last evaluation and of the last logged interval; None where that one has no value."""
    last_interval, _ = run.series("tokens")
    evaluated = [run.series(key)[0][-1] for key in run.keys if key.startswith("eval/")]
    last_evaluation = max(evaluated, default=None)
    if status == "done" and last_evaluation != run.last_step:
        last_evaluation = None  # of the end nothing was finite
    found: dict[str, float | None] = {}
    for key in run.keys:
        last = {"eval": last_evaluation, "loss": last_interval[-1] if last_interval.size else None}
        section = key.partition("/")[0]
        if section in last:
            steps, values = run.series(key)
            found[key] = float(values[-1]) if steps[-1] == last[section] else None
    return found


def _tail_means(run: Run, window: float) -> dict[str, float | None]:
    """Means over the intervals that ended within `window` steps of the last one; None where none was finite."""
    means: dict[str, float | None] = {}
    for key in run.keys:
        if key.startswith(TAIL_PREFIXES):
            steps, values = run.series(key)
            values = values[(steps > run.last_step - window) & np.isfinite(values)]
            means[key] = float(values.mean()) if values.size else None
    return means


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(workdir: str | Path, row: Mapping[str, Any]) -> Path:
    """Writes an arm's row into its run directory, which is created if need be: whole or not at all."""
    path = Path(workdir) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(row))
    return path


def read_record(workdir: str | Path) -> Row | None:
    """The row of an arm; None if it has not ended.

    Raises:
      RecordError: the file is damaged.
    """
    path = Path(workdir) / RECORD_FILE
    remedy = "remove it and run the sweep again: it makes the row anew"
    try:
        row = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except RecordError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged ({error}); {remedy}") from error
    check_row(row, str(path), remedy)
    return row


def read_definition(directory: str | Path) -> dict[str, Any]:
    """What a sweep is to run: `sweep.json`.

    Raises:
      RecordError: it is missing or damaged.
    """
    path = Path(directory) / SWEEP_FILE
    remedy = "restore it, or start the sweep in another directory"
    try:
        definition = json.loads(read_text(path))
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise RecordError(
            f"{path} is missing; `moejax sweep` writes it, so give the directory of a sweep"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged ({error}); {remedy}") from error
    check_definition(definition, str(path), remedy)
    return definition


def collect(directory: str | Path) -> list[Row]:
    """The rows of all arms that have ended, in the order of `sweep.json`; writes them to both joint files.

    Axes are those of `sweep.json`: an arm may have ended before the sweep got another axis.

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
                f"{workdir / RECORD_FILE} is of arm {row['arm']} with config_hash {row.get('config_hash')}, not "
                f"{entry['config_hash']}; remove the folder {workdir} and run the sweep again"
            )
        ending = {key: row.get(key) for key in ENDING}
        rest = {key: value for key, value in row.items() if not key.startswith((OVERRIDE, MATCHED))}
        rows.append(
            {**ending, **{key: _finite(value) for key, value in _axes(entry).items()}, **rest}
        )
    write_jsonl(directory / JSONL_FILE, rows)
    write_parquet(directory / PARQUET_FILE, rows)
    return rows


def read_records(directory: str | Path) -> pd.DataFrame:
    """The joint file of a sweep as a table; see `moejax.sweeps.tables.frame_of`.

    Args:
      directory: of the sweep: `records.jsonl` is read, or `records.parquet` if only that is there.

    Raises:
      RecordError: there is neither, or the one that is read is damaged.
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
            f"{directory} has neither {JSONL_FILE} nor {PARQUET_FILE}; give the directory of a sweep"
        )
    for number, row in enumerate(rows, start=1):
        check_row(
            row,
            f"{path}: row {number}",
            "remove the file and run the sweep again: it joins the rows anew",
        )
    return frame_of(rows)
