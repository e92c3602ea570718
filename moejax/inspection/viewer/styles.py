"""Styles of the page of `moejax view`, for light and dark, and the frame that Panel puts it in."""

INK = """
:host{--ink:#1f2933;--soft:#5b6573;--line:#d9dde3;--bad:#b3261e;color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media(prefers-color-scheme:dark){:host{--ink:#e4e7eb;--soft:#a3adba;--line:#363d46;--bad:#ff9c92}}
"""
TEXT_STYLE = (
    INK
    + """*{box-sizing:border-box}
h1{margin:0;font-size:1.5rem;overflow-wrap:anywhere}
h2{margin:1.2rem 0 .2rem;font-size:1.15rem}
h3{margin:0;font-size:1rem;overflow-wrap:anywhere}
p{margin:.1rem 0;max-width:46rem}
.soft{color:var(--soft);font-size:.875rem}
.bad{color:var(--bad);overflow-wrap:anywhere}
code{font:.85rem ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
code.command span{display:inline-block;max-width:100%;word-break:break-all}
.run{display:grid;grid-template-columns:minmax(0,2.4fr) repeat(5,minmax(0,1fr)) minmax(0,1.6fr);
gap:0 .9rem;padding:.25rem 0;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
.run>*{min-width:0;overflow-wrap:anywhere}
.head{color:var(--soft);font-weight:600;padding-left:1.7rem}
i{display:inline-block;width:.7rem;height:.7rem;margin-right:.4rem;border-radius:.15rem}
iframe{display:block;width:100%;height:85vh;border:1px solid var(--line);border-radius:.4rem;
background:transparent}
@media(prefers-color-scheme:dark){i{filter:invert(.91) hue-rotate(180deg)}}
@media(max-width:44rem){
.head{display:none}
.run{grid-template-columns:1fr 1fr}
.run strong,.run .wide{grid-column:1/-1}
.run [data-name]:before{content:attr(data-name) ": ";color:var(--soft)}
}
"""
)
CHOICE_STYLE = (
    INK
    + """.bk-input-group{display:flex;flex-flow:row wrap;gap:.2rem 1.1rem}
.bk-input-group:before{color:var(--soft)}
.bk-input-group label{margin:0!important;overflow-wrap:anywhere}
label input{accent-color:#0b62a8}
"""
)
TABS_STYLE = (
    INK
    + """.bk-header{border-color:var(--line)!important}
.bk-tab{color:var(--soft)!important;font-size:1rem}
.bk-tab.bk-active{color:var(--ink)!important;background:transparent!important;
border-color:var(--line)!important}
"""
)
# Bokeh leaves what it painted before it knew its width in the first pixels, which are cut off.
PLOT_STYLE = """:host{clip-path:inset(-50rem -50rem -50rem 3px)}
@media(prefers-color-scheme:dark){:host{filter:invert(.91) hue-rotate(180deg)}}"""
LOAD_STYLE = """@media(prefers-color-scheme:dark){
:host{background:#fff;border-radius:.4rem;filter:brightness(.88)}}"""
PAGE = """{% extends "base.html" %}{% block postamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{color-scheme:light dark}
body{padding:1rem!important;background:#fff}
@media(prefers-color-scheme:dark){html,body{background:#171717}}</style>{% endblock %}"""


def choice_style(title: str) -> str:
    """Returns the style of check boxes or radio buttons in a line after a title."""
    return f"{CHOICE_STYLE}.bk-input-group:before{{content:'{title}'}}"
