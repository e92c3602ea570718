"""HTML from templates: what is text is escaped, and no template goes without its values."""

import re
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

import moejax
from cases.pages import HOSTILE, Page
from moejax.inspection import html

PACKAGE = Path(moejax.__file__).parent
TEMPLATES = PACKAGE / "inspection" / "templates"


def test_text_is_escaped_once_and_characters_that_html_forbids_are_shown():
    shown = html.text(HOSTILE)
    assert shown == html.text(shown)
    assert Page(f"<p>{shown}</p>").elements == [("p", {})]
    assert html.text("\x00\t\n\x7f\ud800<'\"&") == "\u2400\t\n\ufffd\ufffd&lt;&#x27;&quot;&amp;"


def test_templates_escape_text_and_keep_markup():
    assert html.code(HOSTILE) == f"<code>{html.text(HOSTILE)}</code>"
    assert html.code(Markup("<b>x</b>")) == "<code><b>x</b></code>"
    rows = [[HOSTILE, Markup("<i>1</i>")]]
    elements = [tag for tag, _ in Page(html.table([HOSTILE, "b"], rows)).elements]
    assert elements == ["table", "thead", "tr", "th", "th", "tbody", "tr", "th", "td", "i"]


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="content"):
        html.render("code")


def test_every_template_is_used_and_compiles():
    sources = [path.read_text() for path in (*PACKAGE.rglob("*.py"), *TEMPLATES.rglob("*.j2"))]
    used = set(re.findall(r'"([\w/]+)(?:\.html\.j2)?"', "".join(sources)))
    environment = html._environment()
    for path in TEMPLATES.rglob("*.html.j2"):
        name = path.relative_to(TEMPLATES).as_posix()
        environment.get_template(name)
        assert name.removesuffix(".html.j2") in used, name
