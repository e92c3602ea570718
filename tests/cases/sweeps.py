"""Sweeps that were never trained: `sweep.json`, and run directories with a few lines of metrics."""

import hashlib
import itertools
import json

STEPS = 100
LOG_EVERY = 10
EVAL_EVERY = 25
VERSIONS = {"python": "3.11", "moejax": "0.1", "jax": "0.9"}


def entry_of(overrides, *, matched=None, steps=STEPS, active=1000):
    """Returns an arm's entry in `sweep.json`."""
    matched = matched or {}
    train = {"num_steps": steps, "log_every": LOG_EVERY, "seed": overrides.get("train.seed", 0)}
    config = {"train": train}
    for key, value in {**overrides, **matched}.items():
        section, leaf = key.split(".")
        config.setdefault(section, {})[leaf] = value
    text = json.dumps(config, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "id": digest[:10],
        "config_hash": digest,
        "overrides": overrides,
        "matched": matched,
        "config": config,
        "params_total": 4000,
        "params_active": active,
        "flops_per_token": 6 * active,
    }


def write_run(workdir, entry, *, loss=3.0, end=STEPS, evaluated=True, **routing):
    """Writes a run directory whose loss falls to `loss` at the end.

    Args:
      workdir: the run directory.
      entry: of the arm, from `entry_of`.
      loss: after the planned steps.
      end: the last step of the run.
      evaluated: whether there are evaluations.
      routing: values of `moe/` in every interval.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    parameters = {"total": entry["params_total"], "active": entry["params_active"]}
    facts = {
        "config": entry["config"],
        "versions": VERSIONS,
        "git_commit": "abc",
        "device": "1 x cpu (cpu)",
        "command": "moejax sweep",
        "parameters": parameters,
    }
    planned = entry["config"]["train"]["num_steps"]
    of_routing = {f"moe/{key}": value for key, value in routing.items()}
    lines = []
    for step in range(1, end + 1):
        loss_of_step = loss + (planned - step) / planned
        if step % LOG_EVERY == 0:
            interval = {"step": step, "loss/lm": loss_of_step} | of_routing
            lines.append(interval | {"tokens": 64 * step, "perf/tokens_per_s": 1000.0})
        if evaluated and (step % EVAL_EVERY == 0 or step == planned):
            evaluation = {"eval/loss": loss_of_step, "eval/max_violation": 0.5}
            lines.append({"step": step} | evaluation)
    (workdir / "config.json").write_text(json.dumps(facts))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    return workdir


def write_definition(directory, entries, **more):
    """Writes `sweep.json`, and returns what is in it."""
    definition = {
        "recipe": "configs/tiny_moe.py",
        "command": "moejax sweep",
        "match": "",
        "versions": VERSIONS,
        "git_commit": "abc",
        "arms": entries,
        "packs": [[entry["id"]] for entry in entries],
        **more,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(definition))
    return definition


def row_of(overrides, loss=3.0, *, status="done", **more):
    """Returns a row as `record_of` would make it, without a run.

    Args:
      overrides: of the arm.
      loss: of its last evaluation.
      status: how it ended.
      more: other columns, with `__` for `/`.
    """
    entry = entry_of(overrides)
    row = {
        "arm": entry["id"],
        "config_hash": entry["config_hash"],
        "status": status,
        "error": None,
        **{f"override/{key}": value for key, value in overrides.items()},
        "seed": entry["config"]["train"]["seed"],
        "params_total": 4000,
        "params_active": 1000,
        "flops_per_token": 6000,
        "steps": STEPS,
        "steps_planned": STEPS,
        "fraction": 1.0,
        "evaluations": json.dumps([[1.0, STEPS, loss]]),
        "final/eval/loss": loss,
        "alarms": 0,
        "alarm_rules": "[]",
        "step_s": 0.1,
    }
    return row | {key.replace("__", "/"): value for key, value in more.items()}


def product(**axes):
    """Returns the points of a full design; `_` after the section's name stands for the dot."""
    keys = [key.replace("_", ".", 1) for key in axes]
    combinations = itertools.product(*axes.values())
    return [dict(zip(keys, values, strict=True)) for values in combinations]
