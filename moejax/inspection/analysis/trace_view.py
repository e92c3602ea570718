"""How the tokens of one text were routed, as text for a terminal and as HTML for a notebook.

The HTML needs no script: radio buttons and CSS switch between layers. Colours are those of Okabe
and Ito (2008), told apart by colour-blind readers, and never alone: each token carries its expert's
number. They are tints over whatever ground there is, so that text reads in light and dark.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int32

from moejax.inspection import html

if TYPE_CHECKING:  # imported where it is needed
    import pandas as pd

WIDTH = 100  # columns of text
TEXT_TOKENS = 24
HTML_TOKENS = 1024  # shown at most
HTML_CELLS = 16_384  # tokens times layers at most: each costs some 200 bytes
SHOWN_CHOICES = 4  # of one token
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
LINES = ("none", "solid", "dashed", "dotted")  # distinguish experts that share a colour
NUM_STYLES = len(COLORS) * len(LINES)
STYLE = """
.moejax-trace{margin:.5rem 0}
.moejax-trace fieldset{display:flex;flex-wrap:wrap;gap:0 .9rem;margin:0 0 .4rem;padding:0;border:0}
.moejax-trace label{cursor:pointer}
.moejax-trace .layer{display:none}
.moejax-trace .token{display:inline-block;line-height:1.5;padding:.1rem .12rem;border-radius:.2rem;
white-space:pre;
font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;unicode-bidi:isolate}
.moejax-trace sup{font-size:.62em;opacity:.8}
.moejax-trace p{margin:.3rem 0;opacity:.8;font-size:.875em}
@supports not selector(:has(a)){.moejax-trace .layer{display:block}}
"""


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
        """Least probability of a token's experts minus the highest of the others, or minus 0.

        Negative where bias or groups overrule the probabilities; NaN where a token has no expert.
        """
        experts_E = np.arange(self.num_experts)
        is_choice_NTKE = self.experts_NTK[..., None] == experts_E
        is_chosen_NTE = is_choice_NTKE.any(axis=2)
        least_NT = np.where(is_chosen_NTE, self.probs_NTE, np.inf).min(axis=-1)
        highest_NT = np.where(is_chosen_NTE, 0.0, self.probs_NTE).max(axis=-1)
        has_expert_NT = is_chosen_NTE.any(axis=-1)
        return np.where(has_expert_NT, least_NT - highest_NT, np.nan)

    def to_frame(self) -> "pd.DataFrame":
        """Returns a pandas table with a row per token, layer and choice.

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
        column = np.where(has_expert, expert, 0)  # of a valid expert, where there is none
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


def as_text(trace: Trace) -> str:
    """Returns a table of the first tokens and layers."""
    columns = _text_columns(trace)
    widths = [max(map(len, column)) for column in columns]
    lines = [_title(trace)]
    for row in zip(*columns, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    num_layers = len(columns) - 2  # the first two are tokens and pieces
    more = []
    if len(trace.tokens_T) > TEXT_TOKENS:
        more.append(f"{len(trace.tokens_T) - TEXT_TOKENS} more tokens")
    if len(trace.layers) > num_layers:
        more.append(f"{len(trace.layers) - num_layers} more layers")
    if more:
        lines.append(f"... {' and '.join(more)}; to_frame() has all")
    return "\n".join(line.rstrip()[:WIDTH] for line in lines)


def _text_columns(trace: Trace) -> list[list[str]]:
    """Returns columns of cells: token, piece, and as many layers as fit, at least one."""
    cells = _Cells(trace)
    tokens = range(min(len(trace.tokens_T), TEXT_TOKENS))
    columns = [
        ["token", *map(str, tokens)],
        ["piece", *(_short(html.visible(trace.pieces[t])) for t in tokens)],
    ]
    width = sum(_width(column) for column in columns)
    for n, layer in enumerate(trace.layers):
        column = [f"layer {layer}", *(cells.in_short(n, t) for t in tokens)]
        width += _width(column)
        if n and width > WIDTH:
            break
        columns.append(column)
    return columns


def _width(column: list[str]) -> int:
    """Returns the width of a column with the gap after it."""
    return max(map(len, column)) + 2


def as_html(trace: Trace) -> str:
    """Returns the text with each token in the colour of its first expert, one layer at a time."""
    num_layers = len(trace.layers)
    fitting = max(1, HTML_CELLS // num_layers)
    num_shown = min(len(trace.tokens_T), HTML_TOKENS, fitting)
    rules = [_rule(style) for style in range(min(trace.num_experts, NUM_STYLES))]
    rules += [_show_rule(n) for n in range(num_layers)]
    switches = [_switch(n, layer) for n, layer in enumerate(trace.layers)]
    cells = _Cells(trace)
    layers = [cells.layer_as_html(n, num_shown) for n in range(num_layers)]
    left_out = len(trace.tokens_T) - num_shown
    foot = f"<p>{left_out:,} more tokens are not shown; to_frame() has all.</p>" if left_out else ""
    # A form of its own makes the buttons a group of their own, however many traces are on a page.
    # Nothing is sent.
    return (
        f'<form class="moejax-trace" method="dialog"><style>{STYLE}{"".join(rules)}</style>'
        f"<p>{html.text(_title(trace))}. The number is a token's first expert; "
        f"point at a token for more.</p><fieldset>{''.join(switches)}</fieldset>"
        f"{''.join(layers)}{foot}</form>"
    )


def _switch(n: int, layer: int) -> str:
    """Returns the button that shows a layer; the first is pressed."""
    checked = " checked" if n == 0 else ""
    button = f'<input type="radio" name="layer" value="{n}"{checked}>'
    return f"<label>{button} Layer {layer}</label>"


def _show_rule(n: int) -> str:
    """Returns the rule that shows a layer while its button is pressed."""
    return f'.moejax-trace:has(input[value="{n}"]:checked) .layer-{n}{{display:block}}'


class _Cells:
    """What is shown of each layer `n` and token `t` of a trace."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.margins_NT = trace.margins_NT
        self.is_mixed_N = (trace.experts_NTK == trace.num_experts).all(axis=(1, 2))

    def choices(self, n: int, t: int) -> list[tuple[int, float]]:
        """Returns the experts of a token with their weights.

        Where a layer mixes all experts, all of them with their probabilities.
        """
        if self.is_mixed_N[n]:
            probs_E = self.trace.probs_NTE[n, t]
            order_E = np.argsort(-probs_E, kind="stable")
            return [(int(expert), float(probs_E[expert])) for expert in order_E]
        experts_K = self.trace.experts_NTK[n, t]
        weights_K = self.trace.weights_NTK[n, t]
        found = []
        for expert, weight in zip(experts_K, weights_K, strict=True):
            if expert < self.trace.num_experts:
                found.append((int(expert), float(weight)))
        return found

    def in_short(self, n: int, t: int) -> str:
        """Returns the choices in the form `3 0.61, 1 0.39`."""
        choices = self.choices(n, t)
        if not choices:
            return "none"
        words = [f"{expert} {weight:.2f}" for expert, weight in choices[:SHOWN_CHOICES]]
        if len(choices) > SHOWN_CHOICES:
            words.append("...")
        return ", ".join(words)

    def layer_as_html(self, n: int, num_tokens: int) -> str:
        """Returns the first tokens of a layer."""
        tokens = "".join(self.as_html(n, t) for t in range(num_tokens))
        return f'<div class="layer layer-{n}">{tokens}</div>'

    def as_html(self, n: int, t: int) -> str:
        """Returns the token's text with the number of its first expert, and in its colour."""
        choices = self.choices(n, t)
        number, style = "none", ""
        if choices:
            first, _ = choices[0]
            number, style = str(first), f" s{first % NUM_STYLES}"
        piece = self.trace.pieces[t]
        line_break = "<br>" if "\n" in piece or piece == "\\n" else ""
        return (
            f'<span class="token{style}" title="{html.text(self._in_full(n, t, choices))}">'
            f"{html.text(html.visible(piece))}<sup>{number}</sup></span>{line_break}"
        )

    def _in_full(self, n: int, t: int, choices: list[tuple[int, float]]) -> str:
        """Returns everything about a token in one layer."""
        parts = [f"token {self.trace.tokens_T[t]} at position {t}"]
        if not choices:
            return "; ".join([*parts, "no expert"])
        if self.is_mixed_N[n]:
            parts.append("mixes all experts")
        for expert, weight in choices[:SHOWN_CHOICES]:
            prob = self.trace.probs_NTE[n, t, expert]
            parts.append(f"expert {expert}: weight {weight:.3f}, probability {prob:.3f}")
        if len(choices) > SHOWN_CHOICES:
            parts.append(f"{len(choices) - SHOWN_CHOICES} more")
        margin = self.margins_NT[n, t]
        if not math.isnan(margin):
            parts.append(f"margin {margin:.3f}")
        return "; ".join(parts)


def _title(trace: Trace) -> str:
    return (
        f"Trace of {len(trace.tokens_T):,} tokens through {len(trace.layers)} MoE layers "
        f"of {trace.num_experts} experts"
    )


def _short(piece: str) -> str:
    return piece if len(piece) <= 14 else f"{piece[:13]}…"


def _rule(style: int) -> str:
    """Returns the rule of one of `NUM_STYLES` styles: a colour, and a line below."""
    color = COLORS[style % len(COLORS)]
    line = LINES[style // len(COLORS)]
    return f".moejax-trace .s{style}{{background:{color}55;border-bottom:2px {line} {color}}}"
