"""What changed routing does to the loss, as plain data: to look at, to draw, to keep as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
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


class CounterfactualError(ValueError):
    """A run or a request that has no counterfactuals, or a file that holds none."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The loss under one change.

    Attributes:
      kind: of the change; "as trained" is none.
      what: in words.
      layer: the model's layer, where one alone is changed.
      experts: that the change concerns.
      setting: K or the capacity factor.
      loss: nats per token.
      change: of the loss against that as trained, on the same rows, nats per token.
      standard_error: of the change, from its differences between rows; NaN with fewer than 2 rows.
      gate_mass: mean sum of a token's combine weights, over the changed layers.
      dropped: share of choices that found no slot, over the changed layers.
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
        """Whether the change is within two standard errors of none."""
        return not abs(self.change) > 2 * self.standard_error


@dataclasses.dataclass(frozen=True)
class Counterfactuals:
    """A checkpoint's loss under changed routing.

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
        """The outcome of no change."""
        return self.rows[0]

    def of_kind(self, kind: str) -> list[Outcome]:
        """The outcomes of one kind of change, in order."""
        return [row for row in self.rows if row.kind == kind]

    @property
    def ablation_NE(self) -> dict[str, Float[np.ndarray, "N E"]]:
        """Change of the loss without one expert: not selectable, and with output 0; NaN where that was left out."""
        return {way: self.by_expert(way) for way in (NOT_SELECTABLE, OUTPUT_ZERO)}

    def by_expert(self, way: str, field: str = "change") -> Float[np.ndarray, "N E"]:
        """A field of the ablations' outcomes by layer and expert; NaN where there is none."""
        values_NE = np.full((len(self.layers), self.num_experts), np.nan)
        for row in self.of_kind("ablate"):
            if row.what == way and row.layer is not None:
                values_NE[self.layers.index(row.layer), row.experts[0]] = getattr(row, field)
        return values_NE

    def to_frame(self) -> Any:
        """The outcomes as a pandas `DataFrame`, a row each."""
        try:
            import pandas
        except ImportError as error:
            raise CounterfactualError(
                "a frame needs pandas, which is not installed: pip install pandas"
            ) from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.rows])

    def table(self) -> list[dict[str, str]]:
        """The outcomes as text, a dict by `COLUMNS` each."""
        return [dict(zip(COLUMNS, _as_text(row), strict=True)) for row in self.rows]

    def summary(self) -> list[dict[str, str]]:
        """The ablations by layer: what its experts are worth, and in brackets which of them most and least."""
        found = []
        for way, change_NE in self.ablation_NE.items():
            error_NE = self.by_expert(way, "standard_error")
            for layer, change_E, error_E in zip(self.layers, change_NE, error_NE, strict=True):
                if np.isnan(change_E).all():
                    continue
                ends = {
                    "largest": int(np.nanargmax(change_E)),
                    "smallest": int(np.nanargmin(change_E)),
                }
                found.append(
                    {
                        "layer": str(layer),
                        "expert": way,
                        "mean change": f"{np.nanmean(change_E):+.4f}",
                    }
                    | {
                        name: f"{change_E[e]:+.4f} ± {error_E[e]:.4f} ({e})"
                        for name, e in ends.items()
                    }
                )
        return found

    def __repr__(self) -> str:
        lines = [self.title(), _aligned(self.table())]
        lines += [f"left out: {what}: {reason}" for what, reason in self.left_out.items()]
        return "\n".join(lines)

    def title(self) -> str:
        """What was evaluated."""
        return f"Step {self.step}, {self.num_rows} validation rows, {self.num_targets} tokens; losses in nats per token"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>"
            for row in self.table()
        )
        left = "".join(
            f"<li>{escape(what)}: {escape(reason)}</li>" for what, reason in self.left_out.items()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p>{escape(self.title())}</p>{table}" + (
            f"<p>Left out:</p><ul>{left}</ul>" if left else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; None for NaN."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file in one rename, so that a reader never sees half of it."""
        path = Path(path)
        replace_file(path, (to_json(dataclasses.asdict(self), indent=1) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Counterfactuals":
        """Reads what `save` wrote.

        Raises:
          CounterfactualError: the file is missing or damaged, or may not be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(Outcome(**_outcome(row)) for row in values.pop("rows"))
            layers, top_k = (
                tuple(int(x) for x in values.pop(name)) for name in ("layers", "top_k")
            )
            left_out = {str(what): str(reason) for what, reason in values.pop("left_out").items()}
            numbers = {name: int(value) for name, value in values.items()}
            found = cls(rows=rows, layers=layers, top_k=top_k, left_out=left_out, **numbers)
            if not rows or rows[0].kind != AS_TRAINED:
                raise ValueError(f"the first row must be {AS_TRAINED}")
            _ = found.ablation_NE  # layers and experts that the rows name exist
        except FileNotFoundError as error:
            raise CounterfactualError(
                f"{path} is missing; `moejax counterfactuals` writes it"
            ) from error
        except OSError as error:
            raise CounterfactualError(
                f"{path} cannot be read ({error.strerror}); see who may read it"
            ) from error
        except (
            RecursionError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
        ) as error:
            raise CounterfactualError(
                f"{path} is damaged ({type(error).__name__}: {error}); run `moejax counterfactuals` again"
            ) from error
        return found


def paired_change(
    nats_R: Float[np.ndarray, "R"],
    trained_R: Float[np.ndarray, "R"],
    targets_R: Float[np.ndarray, "R"],
) -> tuple[float, float]:
    """The change of the mean loss on the same rows, and its standard error.

    The change is a ratio of two sums over rows, of differences d and of targets t. Its standard
    error is that of the ratio estimator, sqrt(R / (R - 1) sum (d - t change)^2) / sum t: rows with
    targets are taken as a sample. What the losses of a row have in common cancels in d.

    Args:
      nats_R: cross-entropy of each row under the change.
      trained_R: as trained.
      targets_R: predicted tokens of each row.

    Returns:
      Both in nats per token; the error is NaN with fewer than 2 rows.

    Source: Cochran 1977, Sampling Techniques, section 6.4.
    """
    differences_R = nats_R - trained_R
    num_targets = targets_R.sum()
    change = differences_R.sum() / num_targets
    rows = np.count_nonzero(targets_R)
    if rows < 2:
        return float(change), math.nan
    squares = ((differences_R - change * targets_R) ** 2).sum()
    return float(change), float(np.sqrt(rows / (rows - 1) * squares) / num_targets)


def _as_text(row: Outcome) -> tuple[str, ...]:
    is_base = row.kind == AS_TRAINED
    return (
        row.kind,
        row.what,
        "all" if row.layer is None else str(row.layer),
        ", ".join(map(str, row.experts)),
        "" if is_base else f"{row.change:+.4f}",
        "" if is_base else f"{row.standard_error:.4f}",
        f"{row.loss:.4f}",
        f"{row.gate_mass:.3f}",
        f"{row.dropped:.2%}",
    )


def _aligned(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Outcome` from JSON, where None stands for NaN."""
    numbers = ("loss", "change", "standard_error", "gate_mass", "dropped")
    found = {name: math.nan if row[name] is None else float(row[name]) for name in numbers}
    optional = {
        "layer": None if row["layer"] is None else int(row["layer"]),
        "setting": None if row["setting"] is None else float(row["setting"]),
    }
    texts = {"kind": str(row["kind"]), "what": str(row["what"])}
    return found | optional | texts | {"experts": tuple(int(expert) for expert in row["experts"])}
