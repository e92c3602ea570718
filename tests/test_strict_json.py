"""JSON that is printed or written has no NaN and no infinity, and a warning names what was lost."""

import ast
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from moejax.strict_json import to_json

PACKAGE = Path(__file__).parents[1] / "moejax"


def refuse_constant(token):
    raise AssertionError(f"{token} is no JSON")


@pytest.mark.parametrize("indent", [None, 2])
def test_numbers_that_are_not_finite_are_null_and_named(indent, caplog):
    value = {
        "loss": float("nan"),
        "rows": [{"a": 1.5, "b": [float("inf"), 2]}, (np.float64("-inf"), "é\ud800")],
        "more": dict.fromkeys(range(3), float("nan")),
        "none": None,
    }
    with caplog.at_level(logging.WARNING, "moejax"):
        text = to_json(value, indent=indent)
    assert json.loads(text, parse_constant=refuse_constant) == {
        "loss": None,
        "rows": [{"a": 1.5, "b": [None, 2]}, [None, "é\ud800"]],
        "more": {"0": None, "1": None, "2": None},
        "none": None,
    }
    assert text.isascii() and (indent is not None or "\n" not in text)
    (line,) = caplog.messages
    assert line == "not finite, and null in the JSON: loss, rows[0].b[0], rows[1][0] and 3 more"
    caplog.clear()
    assert to_json([1.0, "NaN", True]) == '[1.0, "NaN", true]' and not caplog.messages
    assert to_json(float("nan")) == "null" and caplog.messages[0].endswith("the value")


def test_the_command_line_prints_json_through_to_json_only():
    calls = []
    for path in (PACKAGE / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("dumps", "dump"):
                calls.append(f"{path.name}:{node.lineno}")
    assert calls == []
