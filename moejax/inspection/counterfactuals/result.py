"""What interventions on routing do to the loss, as plain data to show, to draw and to keep."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.paths import replace_file
from moejax.strict_json import to_json

AS_TRAINED = "as trained"
FILE_NAME = "counterfactuals.json"
COLUMNS = (
    "kind",
    "what",
    "layer",
    "experts",
    "change",
    "standard error",
    "loss",
    "gate mass",
    "dropped",
)
DAMAGE = (RecursionError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What reading a file of another content raises."""


class CounterfactualError(ValueError):
    """A run or a request that has no counterfactuals, or a file that holds none."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The loss under one intervention.

    Attributes:
      kind: of the intervention; "as trained" is none.
      what: in words.
      layer: the model's layer, where only one is edited.
      experts: that the intervention concerns.
      setting: K or the capacity factor.
      loss: nats per token.
      change: of the loss from that as trained, on the same rows, nats per token.
      standard_error: of the change, from its differences between rows; NaN with fewer than 2 rows.
      gate_mass: mean sum of a token's combine weights, over the edited layers.
      dropped: share of choices that found no slot, over the edited layers.
    """

    kind: str
    what: str
    layer: int | None
    experts: tuple[int, ...]
    setting: float | None
    loss: float
    change: float
    standard_error: float
    gate_mass: float
    dropped: float

    @property
    def is_noise(self) -> bool:
        """Whether the change is at most two standard errors; so it is where there is no error."""
        return not abs(self.change) > 2 * self.standard_error


@dataclasses.dataclass(frozen=True)
class Counterfactuals:
    """A checkpoint's loss under interventions on its routing.

    Attributes:
      rows: the outcomes; the first is as trained.
      left_out: what has no meaning for this run, with the reason.
      step: of the checkpoint.
      num_rows: validation rows that were evaluated.
      num_targets: tokens that were predicted.
      layers: the model's MoE layers.
      num_experts: width of the router, E.
      top_k: experts per token of each MoE layer, as trained.
    """

    rows: tuple[Outcome, ...]
    left_out: Mapping[str, str]
    step: int
    num_rows: int
    num_targets: int
    layers: tuple[int, ...]
    num_experts: int
    top_k: tuple[int, ...]

    @property
    def as_trained(self) -> Outcome:
        """The outcome without any intervention."""
        return self.rows[0]

    def of_kind(self, kind: str) -> list[Outcome]:
        """Returns the outcomes of one kind of intervention, in order."""
        return [row for row in self.rows if row.kind == kind]

    @property
    def ablation_NE(self) -> dict[str, Float[np.ndarray, "N E"]]:
        """Change of the loss without one expert: not selectable, and with output 0.

        NaN where that was left out.
        """
        return {way: self.by_expert(way) for way in (NOT_SELECTABLE, OUTPUT_ZERO)}

    def by_expert(self, way: str, field: str = "change") -> Float[np.ndarray, "N E"]:
        """Returns a field of the ablations' outcomes by layer and expert; NaN where there is none.

        Args:
          way: of ablation, "not selectable" or "output 0".
          field: of `Outcome`.
        """
        values_NE = np.full((len(self.layers), self.num_experts), np.nan)
        for row in self.of_kind("ablate"):
            if row.what != way or row.layer is None:
                continue
            index = self.layers.index(row.layer)
            values_NE[index, row.experts[0]] = getattr(row, field)
        return values_NE

    def to_frame(self) -> Any:
        """Returns the outcomes as a pandas `DataFrame`, a row each."""
        try:
            import pandas
        except ImportError as error:
            raise CounterfactualError(
                "a frame needs pandas, which is not installed: pip install pandas"
            ) from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.rows])

    def table(self) -> list[dict[str, str]]:
        """Returns the outcomes as text, a dict by `COLUMNS` each."""
        return [dict(zip(COLUMNS, _as_text(row), strict=True)) for row in self.rows]

    def summary(self) -> list[dict[str, str]]:
        """Returns a row for each layer and way of ablation.

        Each has the mean change over the layer's experts, and the largest and the smallest change
        with the expert in brackets.
        """
        rows = []
        for way, change_NE in self.ablation_NE.items():
            error_NE = self.by_expert(way, "standard_error")
            for layer, change_E, error_E in zip(self.layers, change_NE, error_NE, strict=True):
                if np.isnan(change_E).all():
                    continue
                most, least = int(np.nanargmax(change_E)), int(np.nanargmin(change_E))
                row = {
                    "layer": str(layer),
                    "expert": way,
                    "mean change": f"{np.nanmean(change_E):+.4f}",
                    "largest": f"{change_E[most]:+.4f} ± {error_E[most]:.4f} ({most})",
                    "smallest": f"{change_E[least]:+.4f} ± {error_E[least]:.4f} ({least})",
                }
                rows.append(row)
        return rows

    def __repr__(self) -> str:
        lines = [self.title(), _aligned(self.table())]
        lines += [f"left out: {what}: {reason}" for what, reason in self.left_out.items()]
        return "\n".join(lines)

    def title(self) -> str:
        """Returns what was evaluated, in one line."""
        return (
            f"Step {self.step}, {self.num_rows} validation rows, {self.num_targets} tokens; "
            "losses in nats per token"
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(_table_row(row.values()) for row in self.table())
        page = (
            f"<p>{escape(self.title())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
        if self.left_out:
            items = [f"{escape(what)}: {escape(why)}" for what, why in self.left_out.items()]
            listed = "".join(f"<li>{item}</li>" for item in items)
            page += f"<p>Left out:</p><ul>{listed}</ul>"
        return page

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file in one rename, so that a reader never sees half of it."""
        path = Path(path)
        text = to_json(dataclasses.asdict(self), indent=1) + "\n"
        replace_file(path, text.encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Counterfactuals":
        """Reads what `save` wrote.

        Raises:
          CounterfactualError: the file is missing or damaged, or may not be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls._from_values(values)
        except FileNotFoundError as error:
            raise CounterfactualError(
                f"{path} is missing; `moejax counterfactuals` writes it"
            ) from error
        except OSError as error:
            raise CounterfactualError(
                f"{path} cannot be read ({error.strerror}); see who may read it"
            ) from error
        except DAMAGE as error:
            raise CounterfactualError(
                f"{path} is damaged ({type(error).__name__}: {error}); "
                "run `moejax counterfactuals` again"
            ) from error

    @classmethod
    def _from_values(cls, values: Any) -> "Counterfactuals":
        """Returns the counterfactuals of a file's JSON, which may be of another kind."""
        rows = tuple(_outcome(row) for row in values.pop("rows"))
        layers = tuple(map(int, values.pop("layers")))
        top_k = tuple(map(int, values.pop("top_k")))
        reasons = values.pop("left_out").items()
        left_out = {str(what): str(reason) for what, reason in reasons}
        numbers = {name: int(value) for name, value in values.items()}
        found = cls(rows=rows, layers=layers, top_k=top_k, left_out=left_out, **numbers)
        if not rows or rows[0].kind != AS_TRAINED:
            raise ValueError(f"the first row must be {AS_TRAINED}")
        _ = found.ablation_NE  # raises unless the layers and experts that rows name exist
        return found


def paired_change(
    nats_R: Float[np.ndarray, "R"],
    trained_R: Float[np.ndarray, "R"],
    targets_R: Float[np.ndarray, "R"],
) -> tuple[float, float]:
    """Returns the change of the mean loss on the same rows, and its standard error.

    The change is a ratio of two sums over rows, of differences d and of targets t. Its standard
    error is that of the ratio estimator, sqrt(R / (R - 1) sum (d - t change)^2) / sum t: rows with
    targets are taken as a sample. What the losses of a row have in common cancels in d.

    Args:
      nats_R: cross-entropy of each row under the intervention.
      trained_R: as trained.
      targets_R: predicted tokens of each row.

    Returns:
      Both in nats per token; the error is NaN with fewer than 2 rows.

    Source: Cochran 1977, Sampling Techniques, section 6.4.
    """
    differences_R = nats_R - trained_R
    num_targets = targets_R.sum()
    change = differences_R.sum() / num_targets
    num_rows = np.count_nonzero(targets_R)
    if num_rows < 2:
        return float(change), math.nan
    squares = ((differences_R - change * targets_R) ** 2).sum()
    error = np.sqrt(num_rows / (num_rows - 1) * squares) / num_targets
    return float(change), float(error)


def _as_text(row: Outcome) -> tuple[str, ...]:
    """Returns the cells of an outcome, by `COLUMNS`."""
    is_trained = row.kind == AS_TRAINED
    return (
        row.kind,
        row.what,
        "all" if row.layer is None else str(row.layer),
        ", ".join(map(str, row.experts)),
        "" if is_trained else f"{row.change:+.4f}",
        "" if is_trained else f"{row.standard_error:.4f}",
        f"{row.loss:.4f}",
        f"{row.gate_mass:.3f}",
        f"{row.dropped:.2%}",
    )


def _table_row(cells: Iterable[str]) -> str:
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a table of text with a head, its columns as wide as their widest cell."""
    head = list(rows[0])
    body = [list(row.values()) for row in rows]
    lines = [head, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded.append("  ".join(cells).rstrip())
    return "\n".join(padded)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _outcome(row: Mapping[str, Any]) -> Outcome:
    """Returns an outcome from JSON, where None stands for NaN."""
    return Outcome(
        kind=str(row["kind"]),
        what=str(row["what"]),
        layer=None if row["layer"] is None else int(row["layer"]),
        experts=tuple(int(expert) for expert in row["experts"]),
        setting=None if row["setting"] is None else float(row["setting"]),
        loss=_number(row["loss"]),
        change=_number(row["change"]),
        standard_error=_number(row["standard_error"]),
        gate_mass=_number(row["gate_mass"]),
        dropped=_number(row["dropped"]),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
