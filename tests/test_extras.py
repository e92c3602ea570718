"""The remedy for missing extras installs from a checkout, and never from the public index."""

import re
from pathlib import Path

from moejax.extras import how_to_install

PACKAGE = Path(__file__).parents[1] / "moejax"


def test_a_remedy_installs_extras_of_a_checkout():
    expected = (
        "in a checkout of moejax, make setup EXTRAS=dev,view,tpu or pip install -e '.[view,tpu]'"
    )
    assert how_to_install("view", "tpu") == expected


def test_no_message_of_the_package_installs_moejax_from_an_index():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(texts) > 100
    wrong = [
        name for name, text in texts.items() if re.search(r"moejax\[|pip install '?moejax", text)
    ]
    assert wrong == []
