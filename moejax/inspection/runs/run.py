"""Opens a run from its directory alone: what was trained, its metrics, and where its tokens went.

Opening reads `config.json` and nothing else, however long the run. `metrics.jsonl` is read when a
metric is first asked for, `routing/` in the slices that are asked for. All of it is data: nothing
found there is executed or unpickled. A run that was interrupted and resumed reads as one run.
"""

import dataclasses
import functools
import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Int64

from moejax.inspection import html
from moejax.inspection.runs.config_file import EXPERT_KINDS, read_config_file
from moejax.inspection.runs.errors import RunError
from moejax.inspection.runs.metrics_file import Series, read_series
from moejax.inspection.runs.names import arm_name
from moejax.paths import resolve_path
from moejax.training.run_directory.reader import RunDirectory, RunTreeError, check_run_tree
from moejax.training.run_directory.routing_log import RoutingHistory, read_routing

if TYPE_CHECKING:  # imported where they are needed: a run opens without them
    import pandas as pd

    from moejax.config import Config, MeshConfig
    from moejax.data import Tokenizer
    from moejax.inference.load import LoadedRun
    from moejax.training.run_directory.evaluation_log import Evaluations


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """One run as its directory describes it.

    Attributes:
      workdir: the directory.
      name: the directory's name.
      config: sections of leaves, as `moejax.config.to_dict` gives them.
      versions: library name to version.
      git_commit: of the code that trained.
      device: in words.
      command: the command line that started the run.
      parameters_total: of the model.
      parameters_active: used by one token.
    """

    workdir: Path
    name: str
    config: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    git_commit: str
    device: str
    command: str
    parameters_total: int
    parameters_active: int

    @property
    def is_dense(self) -> bool:
        """Whether the model has no experts."""
        return self.config.get("moe", {}).get("num_experts", 0) == 0

    @property
    def num_choices(self) -> int:
        """Width of the router: experts with weights, then zero, identity and constant ones."""
        moe = self.config.get("moe", {})
        return sum(moe.get(kind, 0) for kind in EXPERT_KINDS)

    @functools.cached_property
    def settings(self) -> "Config":
        """The resolved configuration.

        Raises:
          ConfigError: this version of moejax cannot resolve it.
        """
        from moejax.training.run_directory.layout import read_config

        return read_config(self.workdir)

    @functools.cached_property
    def flops_per_token(self) -> int | None:
        """Arithmetic of training for one token, by `moejax.planning.count`.

        None where it changes with `schedule.top_k`, and if the configuration is none today.
        """
        from moejax.planning.count import count

        try:
            if self.settings.schedule.top_k != "constant":
                return None
            return count(self.settings).flops_per_token
        except (ValueError, ArithmeticError):
            return None

    @property
    def name_in_words(self) -> str:
        """What sets an arm of a sweep apart; the directory's name for other runs."""
        return arm_name(self.workdir) or self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """The name of every metric, sorted."""
        return tuple(sorted(self._series))

    @property
    def last_step(self) -> int:
        """The last step with a metric; 0 before the first."""
        return max((steps[-1] for steps, _ in self._series.values()), default=0)

    def series(self, key: str) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
        """Returns one metric over time.

        Speed and seconds of an arm of a pack are its share of the pack's time. A resumed run writes
        some steps again: where the step of a key falls back, the values from there on replace the
        earlier ones.

        Args:
          key: a metric name such as `loss/lm` or `eval/loss`.

        Returns:
          Steps, strictly increasing, and values; NaN where the log says null. Both empty if no line
          has the key.

        Raises:
          RunError: `metrics.jsonl` is missing or damaged.
        """
        steps, values = self._series.get(key, (array("q"), array("d")))
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, key: str) -> float | None:
        """Returns the newest value of a metric; None if no line has it."""
        _, values = self._series.get(key, ((), ()))
        return float(values[-1]) if values else None

    @property
    def metrics(self) -> "pd.DataFrame":
        """All metrics: a row per step, training and evaluation together, and a column per metric.

        Columns are floats, sorted by name; NaN where a step has no such metric. See `series` for
        steps that a resumed run wrote again.

        Raises:
          RunError: `metrics.jsonl` is missing or damaged.
        """
        # Copied on write: changes of one table do not reach the next.
        return self._metrics.copy(deep=False)

    @functools.cached_property
    def _metrics(self) -> "pd.DataFrame":
        import pandas as pd

        series = {key: self.series(key) for key in self.keys}
        steps_S = _all_steps(series.values())
        columns = {}
        for key, (steps, values) in series.items():
            column_S = np.full(len(steps_S), np.nan)
            rows = np.searchsorted(steps_S, steps)
            column_S[rows] = values
            columns[key] = column_S
        index = pd.Index(steps_S, name="step")
        return pd.DataFrame(columns, index=index)

    @functools.cached_property
    def _series(self) -> Series:
        """Steps and values of each metric; a warning if they are not those that were written."""
        files = RunDirectory(self.workdir)
        series = read_series(files)
        if self.checkpoints:
            from moejax.training.checkpoints.meta import warn_of_changed_metrics

            warn_of_changed_metrics(files.metrics)
        return series

    @functools.cached_property
    def routing(self) -> RoutingHistory | None:
        """Assignments and more per layer and expert over time.

        None for a dense run or before the first entry.

        Raises:
          RoutingLogError: the log is damaged.
        """
        return read_routing(self.workdir)

    @property
    def evaluations(self) -> "Evaluations":
        """What evaluations saw of the routing: their steps, and a reader of their arrays."""
        from moejax.training.run_directory.evaluation_log import Evaluations

        return Evaluations(self.workdir)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Saved steps, oldest first."""
        return tuple(RunDirectory(self.workdir).saved_steps())

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The run's own tokenizer.

        Raises:
          DataError: it is missing or damaged.
        """
        from moejax.data import load_tokenizer

        return load_tokenizer(self.workdir)

    def load(self, step: int | None = None, mesh: "MeshConfig | None" = None) -> "LoadedRun":
        """Returns the model with a checkpoint's weights; see `moejax.inference.load.load_run`."""
        from moejax.inference.load import load_run

        return load_run(self.workdir, step, mesh)

    def reload(self) -> "Run":
        """Forgets metrics and routing, so that the next look sees what was written since.

        Returns:
          The run itself.
        """
        for name in ("_series", "_metrics", "routing"):
            self.__dict__.pop(name, None)
        return self

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}: {self._model}; {self._parameters} parameters)"

    def _repr_html_(self) -> str:
        source = self._leaf("data", "source")
        seq_len = self._leaf("data", "seq_len")
        num_steps = self._leaf("train", "num_steps")
        batch_size = self._leaf("train", "batch_size")
        checkpoints = ", ".join(map(str, self.checkpoints))
        rows = [
            ("Model", self._model),
            ("Parameters", self._parameters),
            ("Text", f"{source}, rows of {seq_len} tokens"),
            ("Training", f"{num_steps} steps of {batch_size} rows"),
            ("Checkpoints", checkpoints or "none"),
            ("Device", self.device),
            ("Commit", self.git_commit),
        ]
        return f"<div><strong>{html.text(self.name)}</strong>{html.facts(rows)}</div>"

    def _leaf(self, section: str, name: str) -> Any:
        """Returns a leaf of the configuration; `?` where runs of other versions have none."""
        leaves = self.config.get(section, {})
        return leaves.get(name, "?")

    @property
    def _model(self) -> str:
        num_layers = self._leaf("model", "num_layers")
        d_model = self._leaf("model", "d_model")
        layers = f"{num_layers} layers of width {d_model}"
        if self.is_dense:
            return f"dense, {layers}"
        top_k = self._leaf("moe", "top_k")
        router = self._leaf("moe", "router")
        return f"{self.num_choices} experts, top {top_k}, {router}, {layers}"

    @property
    def _parameters(self) -> str:
        return f"{self.parameters_total:,} ({self.parameters_active:,} active)"


def _all_steps(series: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the steps of all metrics, each once, in order."""
    found = [steps for steps, _ in series]
    if not found:
        return np.zeros(0, np.int64)
    all_steps = np.concatenate(found)
    return np.unique(all_steps)


def open_run(workdir: str | Path) -> Run:
    """Opens the run directory `workdir`; of its files only `config.json` is read.

    Raises:
      PathError: no directory can have that path.
      RunError: there is no such directory, it has links out of it or pipes, or its `config.json` is
        missing, damaged or may not be read.
    """
    given, workdir = workdir, resolve_path(workdir)
    if not workdir.is_dir():
        raise RunError(f"{given} is no directory; give the --workdir of a training run")
    try:
        check_run_tree(workdir)
    except RunTreeError as error:
        raise RunError(str(error)) from error
    facts = read_config_file(RunDirectory(workdir))
    return Run(
        workdir=workdir,
        name=workdir.name,
        config=facts["config"],
        versions=facts["versions"],
        git_commit=_as_text(facts["git_commit"]),
        device=_as_text(facts["device"]),
        command=_as_text(facts["command"]),
        parameters_total=facts["parameters"]["total"],
        parameters_active=facts["parameters"]["active"],
    )


def _as_text(value: Any) -> str:
    """Returns text as it is, `unknown` for null, and anything else as JSON."""
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value)
