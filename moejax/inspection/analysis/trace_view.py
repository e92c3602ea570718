"""How the tokens of one text were routed, as text for a terminal and as HTML for a notebook.

The HTML needs no script: radio buttons and CSS switch between layers. Colours are those of Okabe
and Ito (2008), told apart by colour-blind readers, and never alone: each token carries its expert's
number. They are tints over whatever background there is, so that text reads in light and dark.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, Int32

from moejax.inspection import html

if TYPE_CHECKING:  # imported where it is needed
    import pandas as pd

WIDTH = 100  # columns of text
TEXT_TOKENS = 24
HTML_TOKENS = 1024  # shown at most
HTML_CELLS = 16_384  # tokens times layers, at most: each costs some 200 bytes
SHOWN_CHOICES = 4  # of one token
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
LINES = ("none", "solid", "dashed", "dotted")  # set experts apart that share a colour
NUM_STYLES = len(COLORS) * len(LINES)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """How T tokens were routed by N MoE layers.

    Attributes:
      tokens_T: ids.
      pieces: text of each token.
      layers: model layer of each MoE layer.
      experts_NTK: the experts of each token, the best first; `num_experts` where there is no
        (further) expert. Soft routing mixes all experts: there is none, and `probs_NTE` says how
        much of each.
      weights_NTK: their combine weights; 0 where there is no expert.
      logits_NTE: raw router logits; see `scores_by_token` for soft routing.
      probs_NTE: the router's distribution over experts.
      num_experts: width of the router, E: experts with weights, then zero, identity and
        constant ones.
    """

    tokens_T: Int32[np.ndarray, "T"]
    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    experts_NTK: Int32[np.ndarray, "N T K"]
    weights_NTK: Float32[np.ndarray, "N T K"]
    logits_NTE: Float32[np.ndarray, "N T E"]
    probs_NTE: Float32[np.ndarray, "N T E"]
    num_experts: int

    @property
    def margins_NT(self) -> Float[np.ndarray, "N T"]:
        """The margin by which each token's experts were chosen.

        This is the least probability of its experts minus the highest of the others (0 if there are
        none). It is negative where bias or groups overrule the probabilities, and NaN where a token
        has no expert.
        """
        expert_E = np.arange(self.num_experts)
        is_choice_NTKE = self.experts_NTK[..., None] == expert_E
        is_chosen_NTE = is_choice_NTKE.any(axis=2)
        own_probs_NTE = np.where(is_chosen_NTE, self.probs_NTE, np.inf)
        other_probs_NTE = np.where(is_chosen_NTE, 0.0, self.probs_NTE)
        least_NT = own_probs_NTE.min(axis=-1)
        highest_other_NT = other_probs_NTE.max(axis=-1)
        margin_NT = least_NT - highest_other_NT
        has_expert_NT = is_chosen_NTE.any(axis=-1)
        return np.where(has_expert_NT, margin_NT, np.nan)

    def of_layers(self, indices: Sequence[int]) -> "Trace":
        """Returns the trace of some MoE layers, which are counted from 0."""
        chosen = list(indices)
        return dataclasses.replace(
            self,
            layers=tuple(self.layers[n] for n in chosen),
            experts_NTK=self.experts_NTK[chosen],
            weights_NTK=self.weights_NTK[chosen],
            logits_NTE=self.logits_NTE[chosen],
            probs_NTE=self.probs_NTE[chosen],
        )

    def to_frame(self) -> "pd.DataFrame":
        """Returns a row per token, layer and choice.

        Returns:
          Columns `token` (id), `piece`, `position`, `layer` (of the model), `rank` (0 is the best
          choice), `expert`, `weight`, `prob` and `logit`. A token without an expert keeps one row,
          with NA for what a choice has.
        """
        import pandas as pd

        has_expert_NTK = self.experts_NTK < self.num_experts
        is_row_NTK = has_expert_NTK.copy()
        is_row_NTK[:, :, 0] = True
        layer, token, rank = np.nonzero(is_row_NTK)
        expert = self.experts_NTK[layer, token, rank]
        has_expert = has_expert_NTK[layer, token, rank]
        # Without an expert, any column does: what is read there is replaced by NaN.
        column = np.where(has_expert, expert, 0)
        weight = self.weights_NTK[layer, token, rank]
        prob = self.probs_NTE[layer, token, column]
        logit = self.logits_NTE[layer, token, column]
        return pd.DataFrame(
            {
                "token": self.tokens_T[token],
                "piece": np.array(self.pieces, object)[token],
                "position": token,
                "layer": np.array(self.layers)[layer],
                "rank": rank,
                "expert": pd.arrays.IntegerArray(expert.astype(np.int64), ~has_expert),
                "weight": np.where(has_expert, weight, np.nan),
                "prob": np.where(has_expert, prob, np.nan),
                "logit": np.where(has_expert, logit, np.nan),
            }
        )

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(trace: Trace, whole: str = "to_frame()") -> str:
    """Returns a table of the first tokens and layers.

    Args:
      trace: what is shown.
      whole: where a reader finds all of it.
    """
    columns = _text_columns(trace)
    padded_columns = [_pad(column) for column in columns]
    lines = [_title(trace)]
    for row in zip(*padded_columns, strict=True):
        lines.append("  ".join(row))
    num_more_tokens = len(trace.tokens_T) - (len(columns[0]) - 1)
    num_more_layers = len(trace.layers) - (len(columns) - 2)
    more = []
    if num_more_tokens:
        more.append(f"{num_more_tokens} more tokens")
    if num_more_layers:
        more.append(f"{num_more_layers} more layers")
    if more:
        lines.append(f"... {' and '.join(more)}; {whole} has all")
    return "\n".join(line.rstrip()[:WIDTH] for line in lines)


def _text_columns(trace: Trace) -> list[list[str]]:
    """Returns the columns of `as_text`: tokens, pieces, and as many layers as fit."""
    cells = _Cells(trace)
    num_tokens = min(len(trace.tokens_T), TEXT_TOKENS)
    tokens = range(num_tokens)
    pieces = [_shorten(html.visible(piece)) for piece in trace.pieces[:num_tokens]]
    columns = [["token", *map(str, tokens)], ["piece", *pieces]]
    used = sum(_width(column) + 2 for column in columns)
    for n, layer in enumerate(trace.layers):
        choices = [cells.in_short(n, t) for t in tokens]
        column = [f"layer {layer}", *choices]
        used += _width(column) + 2
        if n and used > WIDTH:
            break
        columns.append(column)
    return columns


def _width(column: list[str]) -> int:
    """Returns the length of the longest cell."""
    return max(len(cell) for cell in column)


def _pad(column: list[str]) -> list[str]:
    """Returns the cells, all as long as the longest."""
    width = _width(column)
    return [cell.ljust(width) for cell in column]


def as_html(trace: Trace) -> html.Markup:
    """Returns the text with each token in the colour of its first expert, one layer at a time."""
    cells = _Cells(trace)
    num_tokens = len(trace.tokens_T)
    most_by_cells = max(1, HTML_CELLS // len(trace.layers))
    num_shown = min(num_tokens, HTML_TOKENS, most_by_cells)
    layers = []
    for n, layer in enumerate(trace.layers):
        shown = [cells.shown(n, t) for t in range(num_shown)]
        layers.append({"name": layer, "cells": shown})
    num_styles = min(trace.num_experts, NUM_STYLES)
    return html.render(
        "trace",
        title=_title(trace),
        styles=[_style(number) for number in range(num_styles)],
        layers=layers,
        num_left_out=num_tokens - num_shown,
    )


class _Cells:
    """What is shown of each layer `n` and token `t` of a trace."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.margins_NT = trace.margins_NT
        is_none_NTK = trace.experts_NTK == trace.num_experts
        self.is_mixed_N = is_none_NTK.all(axis=(1, 2))

    def choices(self, n: int, t: int) -> list[tuple[int, float]]:
        """Returns the experts of a token with their weights.

        Where a layer mixes all experts, these are all of them with their probabilities, the highest
        first.
        """
        trace = self.trace
        if self.is_mixed_N[n]:
            probs_E = trace.probs_NTE[n, t]
            experts = np.argsort(-probs_E, kind="stable")
            weights = probs_E[experts]
        else:
            experts_K = trace.experts_NTK[n, t]
            weights_K = trace.weights_NTK[n, t]
            has_expert_K = experts_K < trace.num_experts
            experts = experts_K[has_expert_K]
            weights = weights_K[has_expert_K]
        return list(zip(experts.tolist(), weights.tolist(), strict=True))

    def in_short(self, n: int, t: int) -> str:
        """Returns a token's experts and weights as `3 0.61, 1 0.39`."""
        choices = self.choices(n, t)
        if not choices:
            return "none"
        parts = [f"{expert} {weight:.2f}" for expert, weight in choices[:SHOWN_CHOICES]]
        if len(choices) > SHOWN_CHOICES:
            parts.append("...")
        return ", ".join(parts)

    def shown(self, n: int, t: int) -> dict[str, Any]:
        """Returns what the template shows of a token: its text, first expert, style and details."""
        piece = self.trace.pieces[t]
        choices = self.choices(n, t)
        expert: int | str = "none"
        style = None
        if choices:
            expert, _ = choices[0]
            style = expert % NUM_STYLES
        return {
            "piece": html.visible(piece),
            "expert": expert,
            "style": style,
            "details": self._in_full(n, t, choices),
            "ends_line": "\n" in piece or piece == "\\n",
        }

    def _in_full(self, n: int, t: int, choices: list[tuple[int, float]]) -> str:
        """Returns all that is shown of a token, in words."""
        probs_E = self.trace.probs_NTE[n, t]
        margin = self.margins_NT[n, t]
        num_more = len(choices) - SHOWN_CHOICES
        parts = [f"token {self.trace.tokens_T[t]} at position {t}"]
        if self.is_mixed_N[n]:
            parts.append("mixes all experts")
        for expert, weight in choices[:SHOWN_CHOICES]:
            prob = probs_E[expert]
            parts.append(f"expert {expert}: weight {weight:.3f}, probability {prob:.3f}")
        if num_more > 0:
            parts.append(f"{num_more} more")
        if not math.isnan(margin):
            parts.append(f"margin {margin:.3f}")
        if not choices:
            parts.append("no expert")
        return "; ".join(parts)


def _title(trace: Trace) -> str:
    """Returns what a trace is of."""
    num_tokens = len(trace.tokens_T)
    num_layers = len(trace.layers)
    return (
        f"Trace of {num_tokens:,} tokens through {num_layers} MoE layers of {trace.num_experts} "
        "experts"
    )


def _shorten(piece: str) -> str:
    """Returns a piece of 14 characters at most."""
    if len(piece) <= 14:
        return piece
    return f"{piece[:13]}…"


def _style(number: int) -> dict[str, Any]:
    """Returns the number, colour and underline that show experts."""
    line, color = divmod(number, len(COLORS))
    return {"number": number, "color": COLORS[color], "line": LINES[line]}
