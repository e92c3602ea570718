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
HTML_TOKENS, HTML_CELLS = (
    1024,
    16_384,
)  # tokens shown at most, and tokens times layers: each costs some 200 bytes
SHOWN_CHOICES = 4  # of one token
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
LINES = ("none", "solid", "dashed", "dotted")  # set experts apart that share a colour
NUM_STYLES = len(COLORS) * len(LINES)
STYLE = """
.moejax-trace{margin:.5rem 0}
.moejax-trace fieldset{display:flex;flex-wrap:wrap;gap:0 .9rem;margin:0 0 .4rem;padding:0;border:0}
.moejax-trace label{cursor:pointer}
.moejax-trace .layer{display:none}
.moejax-trace .token{display:inline-block;line-height:1.5;padding:.1rem .12rem;border-radius:.2rem;white-space:pre;
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
        """Least probability of a token's experts minus the highest of the others (0 if there are none).

        Negative where bias or groups overrule the probabilities; NaN where a token has no expert.
        """
        is_chosen_NTE = (self.experts_NTK[..., None] == np.arange(self.num_experts)).any(axis=2)
        least_NT = np.where(is_chosen_NTE, self.probs_NTE, np.inf).min(axis=-1)
        rest_NT = np.where(is_chosen_NTE, 0.0, self.probs_NTE).max(axis=-1)
        return np.where(is_chosen_NTE.any(axis=-1), least_NT - rest_NT, np.nan)

    def to_frame(self) -> "pd.DataFrame":
        """A row per token, layer and choice.

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
        expert, has_expert = (
            self.experts_NTK[layer, token, rank],
            has_expert_NTK[layer, token, rank],
        )
        column = np.where(has_expert, expert, 0)
        return pd.DataFrame(
            {
                "token": self.tokens_T[token],
                "piece": np.array(self.pieces, object)[token],
                "position": token,
                "layer": np.array(self.layers)[layer],
                "rank": rank,
                "expert": pd.arrays.IntegerArray(expert.astype(np.int64), ~has_expert),
                "weight": np.where(has_expert, self.weights_NTK[layer, token, rank], np.nan),
                "prob": np.where(has_expert, self.probs_NTE[layer, token, column], np.nan),
                "logit": np.where(has_expert, self.logits_NTE[layer, token, column], np.nan),
            }
        )

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(trace: Trace) -> str:
    """A table of the first tokens and layers."""
    cells = _Cells(trace)
    tokens = range(min(len(trace.tokens_T), TEXT_TOKENS))
    columns = [["token", *(str(t) for t in tokens)]]
    columns.append(["piece", *(_short(html.visible(trace.pieces[t])) for t in tokens)])
    for n, layer in enumerate(trace.layers):
        column = [f"layer {layer}", *(cells.in_short(n, t) for t in tokens)]
        if n and sum(max(map(len, column)) + 2 for column in [*columns, column]) > WIDTH:
            break
        columns.append(column)
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
    left_out = [
        (len(trace.tokens_T) - len(tokens), "tokens"),
        (len(trace.layers) - len(columns) + 2, "layers"),
    ]
    more = [f"{number} more {what}" for number, what in left_out if number]
    foot = [f"... {' and '.join(more)}; to_frame() has all"] if more else []
    return "\n".join(row.rstrip()[:WIDTH] for row in [_title(trace), *rows, *foot])


def as_html(trace: Trace) -> str:
    """The text with each token in the colour of its first expert, one layer at a time."""
    cells, num_layers = _Cells(trace), len(trace.layers)
    num_shown = min(len(trace.tokens_T), HTML_TOKENS, max(1, HTML_CELLS // num_layers))
    switches = "".join(
        f'<label><input type="radio" name="layer" value="{n}"{" checked" * (n == 0)}> Layer {layer}</label>'
        for n, layer in enumerate(trace.layers)
    )
    rules = "".join(_rule(style) for style in range(min(trace.num_experts, NUM_STYLES)))
    rules += "".join(
        f'.moejax-trace:has(input[value="{n}"]:checked) .layer-{n}{{display:block}}'
        for n in range(num_layers)
    )
    layers = "".join(
        f'<div class="layer layer-{n}">{"".join(cells.as_html(n, t) for t in range(num_shown))}</div>'
        for n in range(num_layers)
    )
    left_out = len(trace.tokens_T) - num_shown
    foot = f"<p>{left_out:,} more tokens are not shown; to_frame() has all.</p>" if left_out else ""
    # A form of its own makes the buttons a group of their own, however many traces are on a page.
    # Nothing is sent.
    return (
        f'<form class="moejax-trace" method="dialog"><style>{STYLE}{rules}</style><p>{html.text(_title(trace))}. The '
        f"number is a token's first expert; point at a token for more.</p><fieldset>{switches}</fieldset>"
        f"{layers}{foot}</form>"
    )


class _Cells:
    """What is shown of each layer `n` and token `t` of a trace."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.margins_NT = trace.margins_NT
        self.is_mixed_N = (trace.experts_NTK == trace.num_experts).all(axis=(1, 2))

    def choices(self, n: int, t: int) -> list[tuple[int, float]]:
        """The experts of a token with their weights; where a layer mixes all experts, all with what they count."""
        probs_E, experts_K = self.trace.probs_NTE[n, t], self.trace.experts_NTK[n, t]
        if self.is_mixed_N[n]:
            return [
                (int(expert), float(probs_E[expert]))
                for expert in np.argsort(-probs_E, kind="stable")
            ]
        weights_K = self.trace.weights_NTK[n, t]
        found = zip(experts_K, weights_K, strict=True)
        return [
            (int(expert), float(weight))
            for expert, weight in found
            if expert < self.trace.num_experts
        ]

    def in_short(self, n: int, t: int) -> str:
        """`3 0.61, 1 0.39`."""
        choices = self.choices(n, t)
        shown = ", ".join(f"{expert} {weight:.2f}" for expert, weight in choices[:SHOWN_CHOICES])
        return (shown or "none") + (", ..." if len(choices) > SHOWN_CHOICES else "")

    def as_html(self, n: int, t: int) -> str:
        """The token's text under the number and in the colour of its first expert."""
        choices, piece = self.choices(n, t), self.trace.pieces[t]
        number, style = (
            (choices[0][0], f" s{choices[0][0] % NUM_STYLES}") if choices else ("none", "")
        )
        line_break = "<br>" if "\n" in piece or piece == "\\n" else ""
        return (
            f'<span class="token{style}" title="{html.text(self._in_full(n, t, choices))}">'
            f"{html.text(html.visible(piece))}<sup>{number}</sup></span>{line_break}"
        )

    def _in_full(self, n: int, t: int, choices: list[tuple[int, float]]) -> str:
        probs_E, margin = self.trace.probs_NTE[n, t], self.margins_NT[n, t]
        parts = [f"token {self.trace.tokens_T[t]} at position {t}"]
        parts += ["mixes all experts"] if self.is_mixed_N[n] else []
        parts += [
            f"expert {expert}: weight {weight:.3f}, probability {probs_E[expert]:.3f}"
            for expert, weight in choices[:SHOWN_CHOICES]
        ]
        parts += [f"{len(choices) - SHOWN_CHOICES} more"] if len(choices) > SHOWN_CHOICES else []
        parts += [] if math.isnan(margin) else [f"margin {margin:.3f}"]
        return "; ".join(parts if choices else [*parts, "no expert"])


def _title(trace: Trace) -> str:
    return f"Trace of {len(trace.tokens_T):,} tokens through {len(trace.layers)} MoE layers of {trace.num_experts} experts"


def _short(piece: str) -> str:
    return piece if len(piece) <= 14 else f"{piece[:13]}…"


def _rule(style: int) -> str:
    color, line = COLORS[style % len(COLORS)], LINES[style // len(COLORS)]
    return f".moejax-trace .s{style}{{background:{color}55;border-bottom:2px {line} {color}}}"
