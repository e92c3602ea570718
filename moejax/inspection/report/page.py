"""Pieces of HTML pages that stand alone: style, figures, tables, the frame, and how a page is written.

Images and styles are inside a page, and its content policy forbids the browser to fetch or send
anything, and to run any script but the one that a page may be given. All text from runs is escaped
with `html.text`. A page reads at a desk and on a phone: figures are small and flow into as many
columns as fit, wide tables scroll inside their box.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import ProfileError
from moejax.inspection.counterfactuals.result import CounterfactualError
from moejax.paths import replace_shared_file
from moejax.training.health.alarms import AlarmFileError
from moejax.training.run_directory.evaluation_log import EvaluationError

MAX_LAYERS = 12  # drawn and listed; of deeper models, evenly spaced ones: they make a page's size
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--soft:#5b6573;--paper:#fff;--panel:#f6f7f9;--line:#d9dde3;--link:#0b62a8;
--shade:#0006}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a3adba;--paper:#14171b;--panel:#1e2329;--line:#363d46;
--link:#7cbcf0;--shade:#fff6}}
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
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--paper) 30%,transparent) 0 0/3rem 100% local,
linear-gradient(270deg,var(--paper) 30%,transparent) 100% 0/3rem 100% local,
linear-gradient(90deg,var(--shade),transparent) 0 0/1rem 100%,
linear-gradient(270deg,var(--shade),transparent) 100% 0/1rem 100%;background-repeat:no-repeat}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:600;white-space:nowrap}
td{overflow-wrap:anywhere}
code span{display:inline-block;max-width:100%;word-break:break-all}
@media(max-width:30rem){.facts th,.facts td{display:block;padding-right:0}.facts th{padding-bottom:0;border:0}}
code,pre{font:.875rem/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:0 1.4rem}
.grid>*{min-width:0;margin:0 0 1.6rem}
@media(min-width:48rem){.grid.four{grid-template-columns:repeat(2,minmax(0,1fr));max-width:60rem}}
.columns{columns:20rem;column-gap:2rem}
.columns>*{margin:0 0 1.6rem}
.columns tr{break-inside:avoid}
.columns table{width:100%}
.columns td:last-child{padding-right:0;text-align:right;overflow-wrap:break-word}
.columns h3{break-after:avoid;padding-bottom:.2rem;border-bottom:2px solid var(--line)}
tr.changed{background:var(--panel)}
tr.changed th::before{content:"● ";color:var(--link)}
.default{display:block;color:var(--soft);font-size:.8rem}
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
.warning{padding:.5rem .8rem;border-left:4px solid #d55e00;background:var(--panel)}
.numbers{font-size:.875rem;white-space:nowrap}
.compared{font-size:.9rem}
.compared td{white-space:nowrap}
.compared thead th{min-width:5.5rem;max-width:14rem;overflow-wrap:break-word}
.compared tbody th{white-space:normal;min-width:7.5rem}
.compared th:first-child{position:sticky;left:0;background:var(--paper)}
.events td{white-space:nowrap}
.events td:last-child{min-width:12rem;white-space:normal}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:.6rem 0 1rem;padding:0;list-style:none}
.key i{display:inline-block;width:2rem;margin-right:.5rem;vertical-align:middle}
.wide{margin:0;overflow-x:auto}
.scroll+h3{margin-top:1.2rem}
.wide img{width:auto;max-width:none}
.wide figcaption{max-width:calc(100vw - 2rem)}
.sortable button{padding:0;border:0;background:none;color:inherit;font:inherit;text-align:inherit;cursor:pointer}
.sortable button::after{content:" ⇅";opacity:.5}
[aria-sort=ascending] button::after{content:" ▲";opacity:1}
[aria-sort=descending] button::after{content:" ▼";opacity:1}
.passage{padding:.6rem .8rem;border:1px solid var(--line);border-radius:.4rem}
"""

Section = tuple[str, str, str]
"""Anchor, title and HTML."""


def render_page(
    title: str, subtitle: str, sections: Sequence[Section], *, kind: str, script: str = ""
) -> str:
    """The whole document, with a list of contents.

    Args:
      title: heading; text.
      subtitle: HTML.
      sections: in order.
      kind: of page, for the window's title.
      script: run at the end of the page; the page must read without it, too.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY
    run = f"<script>{script}</script>" if script else ""
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{name}</h2>{content}</section>\n'
        for anchor, name, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.text(title)}: {kind}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>\n'
        f'<body><header><h1>{html.text(title)}</h1><p class="soft">{subtitle}</p>'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n<main>{body}</main>{run}</body></html>\n'
    )


def write_page(path: str | Path, document: str) -> Path:
    """Writes a page in one rename, so that a reader never sees half of it."""
    path = Path(path)
    replace_shared_file(path, lambda file: file.write(document.encode("utf-8")))
    return path


def guarded(section: Callable[[], str]) -> str:
    """A section, or why it cannot be made: one damaged file beside a run does not cost the rest of the page."""
    try:
        return section()
    except (AlarmFileError, CounterfactualError, EvaluationError, ProfileError) as error:
        return f'<p class="warning">Left out: {html.text(error)}</p>'


def number(value: float | None) -> str:
    """Four digits, or all of them before the point."""
    if value is None:
        return "not logged yet"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def figure(
    title: str, reading: str, image: str, *, value: str = "", kind: str = "", alt: str = ""
) -> str:
    """A figure under its heading. `title`, `reading` and `value` are HTML; `kind` is a class of the style.

    `alt`, text, says what the figure shows to those who do not see it; without it, it is the title.
    """
    shown = f'<span class="value">{value}</span>' if value else ""
    return (
        f'<figure class="{kind}"><figcaption>{shown}<h3>{title}</h3><p>{reading}</p></figcaption>'
        f'<img src="{image}" alt="{html.text(alt) or f"{title}, as a figure"}"></figure>'
    )


def grid(parts: Iterable[str]) -> str:
    """Figures side by side, as many as fit; four of them two by two."""
    parts = list(parts)
    kind = "grid four" if len(parts) == 4 else "grid"
    return f'<div class="{kind}">{"".join(parts)}</div>'


def table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose first column names the rows. Cells are HTML.

    Where it is wider than its place, a shade at its edge shows that there is more; it scrolls, by
    keyboard too.
    """
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    """Content that opens at a click."""
    return f"<details{' open' * is_open}><summary>{summary}</summary>{content}</details>"


def drawn_layers(num_layers: int, most: int = MAX_LAYERS) -> list[int]:
    """Rows of the layers that are shown."""
    return np.unique(
        np.linspace(0, num_layers - 1, min(num_layers, most)).round().astype(int)
    ).tolist()


def left_out(num_layers: int, most: int = MAX_LAYERS) -> str:
    """Says which layers `drawn_layers` leaves out."""
    shown = len(drawn_layers(num_layers, most))
    return (
        ""
        if shown == num_layers
        else f"<p>{shown} of {num_layers} MoE layers are shown, evenly spaced.</p>"
    )
