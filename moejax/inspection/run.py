"""Open a run from its directory alone: what was trained, with which numbers, and where its tokens went.

Reads `config.json`, `metrics.jsonl` and `routing/` as data: nothing found there is executed or unpickled, and no
plotting library is needed. A run that was interrupted and resumed reads as one run.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from moejax.training.routing_log import RoutingHistory, read_routing

CONFIG_KEYS = ("config", "versions", "git_commit", "device", "command", "parameters")


class RunError(ValueError):
    """A run directory that cannot be read: the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run as its directory describes it.

    Attributes:
      name: the directory's name.
      config: sections of leaves, as `moejax.config.to_dict` gives them.
      versions: library name to version.
      git_commit: of the code that trained.
      device: in words.
      command: the command line that started the run.
      parameters_total: of the model.
      parameters_active: used by one token.
      lines: the metric lines in the order they were written.
      keys: every metric name in `lines`, sorted.
      routing: assignments per layer and expert over time; None for a dense run or before the first entry.
      metrics_file: where `lines` came from, for error messages.
    """

    name: str
    config: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    git_commit: str
    device: str
    command: str
    parameters_total: int
    parameters_active: int
    lines: tuple[Mapping[str, Any], ...]
    keys: tuple[str, ...]
    routing: RoutingHistory | None
    metrics_file: Path

    @property
    def is_dense(self) -> bool:
        """Whether the model has no experts."""
        return self.config.get("moe", {}).get("num_experts", 0) == 0

    @property
    def num_choices(self) -> int:
        """Width of the router: experts with weights, then zero, identity and constant ones."""
        moe = self.config.get("moe", {})
        kinds = ("num_experts", "num_zero_experts", "num_identity_experts", "num_constant_experts")
        return sum(moe.get(kind, 0) for kind in kinds)

    def series(self, key: str) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
        """One metric over time.

        A resumed run writes some steps again: where the step of a key falls back, the values from there on replace the
        earlier ones.

        Args:
          key: a metric name such as `loss/lm` or `eval/loss`.

        Returns:
          Steps, strictly increasing, and values; NaN where the log says null. Both empty if no line has the key.

        Raises:
          ValueError: a value is not a number.
        """
        steps: list[int] = []
        values: list[float] = []
        for line in self.lines:
            if key not in line:
                continue
            value = line[key]
            if not isinstance(value, (int, float, type(None))):
                where = f"{self.metrics_file}, step {line['step']}"
                raise RunError(f"{where}: {key}={value!r} must be a number or null; delete that line")
            while steps and steps[-1] >= line["step"]:
                steps.pop()
                values.pop()
            steps.append(line["step"])
            values.append(math.nan if value is None else float(value))
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, key: str) -> float | None:
        """The newest value of a metric; None if no line has it."""
        _, values = self.series(key)
        return float(values[-1]) if values.size else None


def open_run(workdir: str | Path) -> RunRecord:
    """Reads the run directory `workdir`.

    Raises:
      ValueError: a file is missing or damaged; the message names it and the remedy.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise RunError(f"{workdir} is no directory; give the --workdir of a training run")
    facts = _read_config(workdir / "config.json")
    lines = tuple(_read_lines(workdir / "metrics.jsonl"))
    return RunRecord(
        name=workdir.resolve().name,
        config=facts["config"],
        versions=facts["versions"],
        git_commit=_as_text(facts["git_commit"]),
        device=_as_text(facts["device"]),
        command=_as_text(facts["command"]),
        parameters_total=facts["parameters"]["total"],
        parameters_active=facts["parameters"]["active"],
        lines=lines,
        keys=tuple(sorted({key for line in lines for key in line})),
        routing=read_routing(workdir),
        metrics_file=workdir / "metrics.jsonl",
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; `moejax train` writes it, so give the --workdir of a run") from error


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "restore it, or start the run's `moejax train` command again: it rewrites the file"
    try:
        facts = json.loads(_read_bytes(path).decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); {remedy}") from error
    missing = [key for key in CONFIG_KEYS if not isinstance(facts, dict) or key not in facts]
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}; {remedy}")
    for key in ("config", "versions", "parameters"):
        if not isinstance(facts[key], dict):
            raise RunError(f"{path}: {key} must be a JSON object; {remedy}")
    for section, leaves in facts["config"].items():
        if not isinstance(leaves, dict):
            raise RunError(f"{path}: config.{section} must be a JSON object; {remedy}")
    num_experts = facts["config"].get("moe", {}).get("num_experts", 0)
    if type(num_experts) is not int or num_experts < 0:
        raise RunError(f"{path}: config.moe.num_experts={num_experts!r} must be an integer of at least 0; {remedy}")
    for key in ("total", "active"):
        if not isinstance(facts["parameters"].get(key), int):
            raise RunError(f"{path}: parameters.{key} must be an integer; {remedy}")
    return facts


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of `metrics.jsonl`; a last line that a crash cut off is left out."""
    lines = _read_bytes(path).split(b"\n")
    end = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    for i, line in enumerate(lines[: end + 1]):
        try:
            values = json.loads(line.decode())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if i == end:
                return
            raise RunError(f"{path}: line {i + 1} is damaged ({error}); delete that line") from error
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise RunError(f"{path}: line {i + 1} must be a JSON object with an integer `step`; delete that line")
        yield values


def _as_text(value: Any) -> str:
    """Text as it is, `unknown` for null, and anything else as JSON."""
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value)
