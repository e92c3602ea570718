"""Sweeps that were never trained: `sweep.json` and run directories with a few lines of metrics each."""

import hashlib
import itertools
import json

STEPS, LOG_EVERY, EVAL_EVERY = 100, 10, 25
VERSIONS = {"python": "3.11", "moejax": "0.1", "jax": "0.9"}


def entry_of(overrides, *, matched=None, steps=STEPS, active=1000):
    """An arm's entry in `sweep.json`."""
    config = {
        "train": {
            "num_steps": steps,
            "log_every": LOG_EVERY,
            "seed": overrides.get("train.seed", 0),
        }
    }
    for key, value in {**overrides, **(matched or {})}.items():
        section, leaf = key.split(".")
        config.setdefault(section, {})[leaf] = value
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {
        "id": digest[:10], "config_hash": digest, "overrides": overrides, "matched": matched or {}, "config": config,
        "params_total": 4000, "params_active": active, "flops_per_token": 6 * active,
    }  # fmt: skip


def write_run(workdir, entry, *, loss=3.0, end=STEPS, evaluated=True, **routing):
    """A run directory whose loss falls to `loss` at the end; `routing` are values of `moe/` in every interval."""
    workdir.mkdir(parents=True, exist_ok=True)
    facts = {
        "config": entry["config"], "versions": VERSIONS, "git_commit": "abc", "device": "1 x cpu (cpu)",
        "command": "moejax sweep", "parameters": {"total": entry["params_total"], "active": entry["params_active"]},
    }  # fmt: skip
    planned = entry["config"]["train"]["num_steps"]
    lines = []
    for step in range(1, end + 1):
        if step % LOG_EVERY == 0:
            of_routing = {f"moe/{key}": value for key, value in routing.items()}
            lines.append({"step": step, "loss/lm": loss + (planned - step) / planned, **of_routing, "tokens": 64 * step,
                          "perf/tokens_per_s": 1000.0})  # fmt: skip
        if evaluated and (step % EVAL_EVERY == 0 or step == planned):
            lines.append(
                {
                    "step": step,
                    "eval/loss": loss + (planned - step) / planned,
                    "eval/max_violation": 0.5,
                }
            )
    (workdir / "config.json").write_text(json.dumps(facts))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def write_definition(directory, entries, **more):
    """Writes `sweep.json`; returns what is in it."""
    definition = {
        "recipe": "configs/tiny_moe.py", "command": "moejax sweep", "match": "", "versions": VERSIONS,
        "git_commit": "abc", "arms": entries, "packs": [[entry["id"]] for entry in entries], **more,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(definition))
    return definition


def row_of(overrides, loss=3.0, *, status="done", **more):
    """A row as `record_of` would make it, without a run; `more` are columns, `/` written as `__`."""
    entry = entry_of(overrides)
    row = {
        "arm": entry["id"], "config_hash": entry["config_hash"], "status": status, "error": None,
        **{f"override/{key}": value for key, value in overrides.items()},
        "seed": entry["config"]["train"]["seed"], "params_total": 4000, "params_active": 1000, "flops_per_token": 6000,
        "steps": STEPS, "steps_planned": STEPS, "fraction": 1.0, "evaluations": json.dumps([[1.0, STEPS, loss]]),
        "final/eval/loss": loss, "alarms": 0, "alarm_rules": "[]", "step_s": 0.1,
    }  # fmt: skip
    return row | {key.replace("__", "/"): value for key, value in more.items()}


def product(**axes):
    """Points of a full design; `_` after the section's name stands for the dot."""
    keys = [key.replace("_", ".", 1) for key in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes.values())]
