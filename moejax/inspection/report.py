"""A run as one HTML page: how training went, how tokens were routed, and what the model writes.

The page stands alone: images and styles are inside, it has no scripts, and its content policy forbids the browser to
fetch anything. All text from the run is escaped. It reads at a desk and on a phone: figures are small and flow into as
many columns as fit, wide tables scroll inside their box.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.inspection import figures
from moejax.inspection.figures import Chart
from moejax.inspection.run import Run
from moejax.inspection.specialisation import TokenShare, over_represented_tokens

MAX_LAYERS = 12  # drawn and listed; of deeper models, evenly spaced ones. Layers and tokens make the page's size:
MAX_TOKENS = 9_000  # listed in all, fewer for each expert where there are many experts
FINAL_FRACTION = 0.1  # of the logged intervals: what "final load" sums over
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
FORBIDDEN = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"}  # by HTML: shown as their control pictures,
FORBIDDEN |= dict.fromkeys([*range(127, 160), *range(0xD800, 0xE000)], 0xFFFD)  # or as the replacement character
STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--soft:#5b6573;--paper:#fff;--panel:#f6f7f9;--line:#d9dde3;--link:#0b62a8}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a3adba;--paper:#14171b;--panel:#1e2329;--line:#363d46;
--link:#7cbcf0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:76rem;padding:1rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{margin:.5rem 0 0;font-size:1.8rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:2.5rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--line);font-size:1.3rem}
h3{margin:0;font-size:1rem}
p{margin:.4rem 0 .8rem;max-width:46rem}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1rem 0;padding:0;list-style:none}
.soft,figcaption p{color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:600;white-space:nowrap}
td{overflow-wrap:anywhere}
code span{display:inline-block;max-width:100%;word-break:break-all}
@media(max-width:30rem){.facts th{width:7rem;white-space:normal}}
code,pre{font:.875rem/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:0 1.4rem}
.grid>*{min-width:0;margin:0 0 1.6rem}
figure{display:grid;grid-row:span 2;grid-template-rows:subgrid}
figure img{display:block;width:100%;max-width:32rem;height:auto}
figcaption p{margin:.1rem 0 .4rem;font-size:.875rem}
.value{float:right;padding-left:.6rem;color:var(--soft);font-variant-numeric:tabular-nums}
@media(prefers-color-scheme:dark){figure img{filter:invert(1) hue-rotate(180deg)}
figure.true-colors img{padding:.3rem;border-radius:.4rem;background:#fff;filter:brightness(.88)}}
details{margin:.4rem 0;border:1px solid var(--line);border-radius:.4rem}
summary{padding:.5rem .8rem;cursor:pointer;font-weight:600}
details .scroll{padding:0 .8rem .6rem}
.tokens td:last-child{min-width:13rem;line-height:1.9}
.tokens span{margin-right:.35rem;padding:.1rem .35rem;border-radius:.3rem;background:var(--panel);
font:.875rem ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;unicode-bidi:isolate}
.tokens small{padding-left:.35rem;color:var(--soft)}
pre{margin:.3rem 0 1.4rem;padding:.8rem;border-radius:.4rem;background:var(--panel);white-space:pre-wrap;
overflow-wrap:anywhere}
pre b{color:var(--link)}
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that the model wrote.

    Attributes:
      prompt: what it was given.
      text: what it wrote behind that, without the prompt.
      temperature: of the sampling; 0 is greedy.
      top_p: the probability mass sampled from.
    """

    prompt: str
    text: str
    temperature: float
    top_p: float


def render_report(
    run: Run,
    *,
    token_counts_NEV: Int[np.ndarray, "N E V"] | None,
    piece: Callable[[int], str],
    samples: Sequence[Sample],
) -> str:
    """Renders the page.

    Args:
      run: the record of a run.
      token_counts_NEV: how often each expert got each token, from `count_tokens_by_expert` on validation text; None
        leaves the table of tokens out.
      piece: token id to text.
      samples: texts that the model wrote.

    Returns:
      An HTML document.
    """
    sections = [
        ("summary", "Summary", _summary(run)),
        ("losses", "Losses", _charts(run, (*figures.LOSS_CHARTS, *_other_losses(run)))),
        ("speed", "Speed and optimisation", _charts(run, figures.SPEED_CHARTS)),
    ]
    if run.is_dense:
        sections.append(("routing", "Routing", "<p>This is a dense run: it has no experts, so nothing is routed.</p>"))
    else:
        sections += [
            ("routing", "Routing health", _charts(run, figures.routing_charts(run.num_choices))),
            ("load", "Expert load over time", _load_over_time(run)),
            ("final-load", "Final expert load", _final_load(run)),
            ("tokens", "What each expert takes", _tokens(run, token_counts_NEV, piece)),
        ]
    sections += [("samples", "Samples", _samples(samples)), ("config", "Configuration", _config(run))]
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>{html}</section>\n' for anchor, title, html in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(run.name)}: run report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>\n'
        f'<body><header><h1>{_text(run.name)}</h1><p class="soft">{_kind(run)}</p>'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>{body}</main></body></html>\n'
    )


def write_report(workdir: str | Path, html: str) -> Path:
    """Writes `report.html` into the run directory in one rename, so that a reader never sees half a page."""
    path = Path(workdir) / "report.html"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=workdir, suffix=".partial", delete=False) as file:
        try:
            file.write(html)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private, reports are for showing
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def _text(value: Any) -> str:
    """Text from the run, made harmless: escaped, and characters that HTML forbids replaced."""
    return escape(str(value).translate(FORBIDDEN))


def _number(value: float | None) -> str:
    if value is None:
        return "not logged yet"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(title: str, reading: str, image: str, *, value: str = "", kind: str = "") -> str:
    """A figure under its heading. `title`, `reading` and `value` are HTML."""
    shown = f'<span class="value">{value}</span>' if value else ""
    return (
        f'<figure class="{kind}"><figcaption>{shown}<h3>{title}</h3><p>{reading}</p></figcaption>'
        f'<img src="{image}" alt="{title}, as a figure"></figure>'
    )


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose first column names the rows. Cells are HTML."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _kind(run: Run) -> str:
    if run.is_dense:
        return "Dense model"
    moe = run.config["moe"]
    layers = "" if run.routing is None else f" in {len(run.routing.layers)} layers"
    return f"Mixture of Experts: {_text(moe['num_experts'])} experts, top {_text(moe.get('top_k', '?'))}{layers}"


def _summary(run: Run) -> str:
    eval_steps, losses = run.series("eval/loss")
    loss = f"{_number(losses[-1])} nats per token, at step {eval_steps[-1]:,}" if losses.size else "no evaluation yet"
    if losses.size and np.isfinite(losses).any() and (best := int(np.nanargmin(losses))) != losses.size - 1:
        loss += f" (lowest: {_number(losses[best])} at step {eval_steps[best]:,})"
    total, active = run.parameters_total, run.parameters_active
    _, speeds = run.series("perf/tokens_per_s")
    speeds = speeds[np.isfinite(speeds)]
    steps = run.last_step
    skipped = run.last("skipped_steps")
    rows = [
        ("Parameters", f"{total:,} in total, {active:,} active for a token ({active / max(total, 1):.0%})"),
        ("Validation loss", loss),
        ("Perplexity", _number(run.last("eval/perplexity"))),
        ("Bits per byte", _number(run.last("eval/bits_per_byte"))),
        ("Tokens per second", _number(np.median(speeds)) + " (median)" if speeds.size else _number(None)),
        ("Steps done", f"{steps:,} of {_text(run.config.get('train', {}).get('num_steps', '?'))}"),
        ("Steps skipped", "" if skipped is None else f"{skipped:,.0f}, for a gradient that was not finite"),
        ("Tokens seen", _number(run.last("tokens"))),
        ("Device", _text(run.device)),
        ("Versions", _text(", ".join(f"{name} {version}" for name, version in run.versions.items()))),
        ("Commit", f"<code>{_text(run.git_commit)}</code>"),
        ("Command", f"<code>{' '.join(f'<span>{_text(word)}</span>' for word in run.command.split())}</code>"),
    ]
    return _table((), [row for row in rows if row[1]], kind="facts")


def _other_losses(run: Run) -> list[Chart]:
    """A chart for each logged loss that the known charts leave out, so that none is hidden."""
    known = {key for chart in figures.LOSS_CHARTS for key, _ in chart.keys}
    others = [key for key in run.keys if key.startswith("loss/") and key not in known]
    return [Chart(key, ((key, ""),), "value", "As logged.") for key in others]


def _charts(run: Run, charts: Iterable[Chart]) -> str:
    shown = []
    for chart in charts:
        image = figures.draw_chart(chart, run.series)
        if image is not None:
            key, label = chart.keys[0]
            last = f"{_text(label) if len(chart.keys) > 1 else 'last'}: {_number(run.last(key))}"
            shown.append(_figure(_text(chart.title), _text(chart.reading), image, value=last))
    return f'<div class="grid">{"".join(shown)}</div>' if shown else "<p>Nothing is logged yet.</p>"


def _drawn_layers(num_layers: int) -> list[int]:
    """Rows of the layers that are shown."""
    return np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int)).tolist()


def _left_out(num_layers: int) -> str:
    shown = len(_drawn_layers(num_layers))
    return "" if shown == num_layers else f"<p>{shown} of {num_layers} MoE layers are shown, evenly spaced.</p>"


def _load_over_time(run: Run) -> str:
    routing = run.routing
    if routing is None or not routing.steps.size:
        return "<p>No routing is logged yet.</p>"
    shown = []
    for n in _drawn_layers(len(routing.layers)):
        image = figures.draw_load_over_time(routing.steps, routing.counts_SNE[:, n])
        shown.append(_figure(f"Layer {routing.layers[n]}", "", image, kind="true-colors"))
    return (
        "<p>Assignments to each expert over those of a uniform load, before any are dropped. White is uniform, red is "
        "overloaded, blue is underused, black got no token at all. Good: pale everywhere. A row that stays dark blue "
        "or black is an expert that hardly learns.</p>"
        f'{_left_out(len(routing.layers))}<div class="grid">{"".join(shown)}</div>'
    )


def _final_load(run: Run) -> str:
    routing = run.routing
    if routing is None or not routing.steps.size:
        return "<p>No routing is logged yet.</p>"
    S, N, _ = routing.counts_SNE.shape
    entries = math.ceil(FINAL_FRACTION * S)
    ratio_NE = figures.load_ratio(counts_NE := routing.counts_SNE[-entries:].sum(axis=0))
    since = routing.steps[-entries - 1] if entries < S else 0
    dead = [(layer, np.flatnonzero(row == 0)) for layer, row in zip(routing.layers, counts_NE, strict=True)]
    names = [f"in layer {layer}: {', '.join(map(str, experts))}" for layer, experts in dead if experts.size]
    num_dead = f"{(counts_NE == 0).sum()} of {counts_NE.size} experts"
    verdict = f"Dead: {num_dead}; {'; '.join(names)}." if names else "No expert is dead."
    shown = []
    for n in _drawn_layers(N):
        high, low = int(ratio_NE[n].argmax()), int(ratio_NE[n].argmin())
        reading = f"Busiest: {high} ({ratio_NE[n, high]:.2f}). Least used: {low} ({ratio_NE[n, low]:.2f})."
        if dead[n][1].size:
            reading += f" Dead: {', '.join(map(str, dead[n][1]))}."
        shown.append(_figure(f"Layer {routing.layers[n]}", reading, figures.draw_final_load(counts_NE[n])))
    return (
        f"<p>Load over uniform load, summed over steps {since + 1:,} to {routing.steps[-1]:,}: 1 is an even share. An "
        f"expert is dead if it got no token in that time. <strong>{verdict}</strong></p>"
        f'{_left_out(N)}<div class="grid">{"".join(shown)}</div>'
    )


def _tokens(run: Run, token_counts_NEV: np.ndarray | None, piece: Callable[[int], str]) -> str:
    if token_counts_NEV is None or not token_counts_NEV.size:
        return "<p>Not counted for this report.</p>"
    N, E, _ = token_counts_NEV.shape
    layers = range(N) if run.routing is None else run.routing.layers
    drawn = _drawn_layers(N)
    top = int(np.clip(MAX_TOKENS // (len(drawn) * E), 1, 12))
    share_NE = figures.load_ratio(token_counts_NEV.sum(axis=2))
    parts = []
    for n, ranked in zip(drawn, over_represented_tokens(token_counts_NEV[drawn], top=top), strict=True):
        rows = [(str(e), f"{share_NE[n, e]:.2f}", _pieces(ranked[e], piece)) for e in range(E)]
        table = _table(("Expert", "Load", "Tokens"), rows, kind="tokens")
        parts.append(f"<details{' open' * (n == drawn[0])}><summary>Layer {layers[n]}</summary>{table}</details>")
    return (
        "<p>The tokens that each expert gets more often than it would if routing ignored their identity, the strongest "
        "evidence first (log-likelihood ratio; rare tokens and chance are left out). The number behind a token is how "
        "many times more often; load is the expert's over the uniform load on the text counted. Nothing listed means "
        f"routing by something else than the word.</p>{_left_out(N)}{''.join(parts)}"
    )


def _pieces(tokens: Sequence[TokenShare], piece: Callable[[int], str]) -> str:
    if not tokens:
        return '<i class="soft">nothing stands out</i>'
    return " ".join(
        f'<span title="id {t.token}, {t.num_assignments:,} times">{_visible(piece(t.token))}'
        f"<small>{t.ratio:.1f}</small></span>"
        for t in tokens
    )


def _visible(piece: str) -> str:
    """A token's text with blanks that can be seen; invisible characters by code point."""
    shown = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return _text("".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in shown)) or "∅"


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return "<p>None were written for this report.</p>"
    return "<p>The prompt in bold, then what the model wrote.</p>" + "".join(
        f'<p class="soft">Temperature {s.temperature:g}, top-p {s.top_p:g}</p>'
        f"<pre><b>{_text(s.prompt)}</b>{_text(s.text)}</pre>"
        for s in samples
    )


def _config(run: Run) -> str:
    def section(name: str, leaves: Mapping[str, Any]) -> str:
        rows = [(_text(key), f"<code>{_text(json.dumps(value))}</code>") for key, value in leaves.items()]
        return f"<div><h3>{_text(name)}</h3>{_table((), rows)}</div>"

    return f'<div class="grid">{"".join(section(*item) for item in run.config.items())}</div>'
