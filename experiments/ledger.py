"""Writes `ledger.md`: what every experiment asked and predicted, and what came of it.

  python experiments/ledger.py

Each experiment has `claims.json`, a list of predictions with their verdicts. Numbers are not
written there: a place such as {balance.*.eval/max_violation:.2f} is filled from the experiment's
`results.json`, and is a mean where it names several values. In a place, parts between dots are
keys; `*` takes all values, and [router=hash,top_k=1] the rows of a list that have these values.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LEDGER = FOLDER / "ledger.md"
PLACE = re.compile(r"\{([^{}:]+):([^{}]+)\}")
COMMAND = re.compile(r"    (\.venv/bin/)?(moejax|python) ")
VERDICTS = ("held", "failed", "not told apart", "not run yet")

HEAD = """# The ledger

Every prediction of an experiment here, and what came of it, failures included. `python
experiments/ledger.py` writes this page from `claims.json` and `results.json` of each experiment; a
test compares them.

| question | predicted | verdict | measured | command |
|---|---|---|---|---|
"""


def read(folder: Path) -> list[dict[str, str]]:
    """Returns the claims of an experiment with their numbers filled in."""
    claims = json.loads((folder / "claims.json").read_text())
    results_path = folder / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else None
    found = []
    for claim in claims:
        if claim["verdict"] not in VERDICTS:
            raise ValueError(f"{folder.name}: verdict {claim['verdict']!r} is none of {VERDICTS}")
        found.append(claim | {"measured": fill(claim["measured"], results)})
    return found


def fill(text: str, results: Any) -> str:
    """Returns a text with the places in it filled."""

    def number(match: re.Match[str]) -> str:
        values = take(results, match.group(1).split("."))
        return format(statistics.fmean(values), match.group(2))

    return PLACE.sub(number, text)


def take(value: Any, keys: list[str]) -> list[float]:
    """Returns all numbers that a path names.

    Raises:
      KeyError: it names nothing.
    """
    if not keys:
        return [float(value)]
    key, *rest = keys
    if key == "*":
        children = list(value.values()) if isinstance(value, dict) else list(value)
    elif key.startswith("["):
        wanted = dict(pair.split("=") for pair in key.strip("[]").split(","))
        children = [row for row in value if all(str(row[k]) == v for k, v in wanted.items())]
    elif isinstance(value, list):
        children = [value[int(key)]]
    else:
        children = [value[key]]
    if not children:
        raise KeyError(f"{key} takes nothing")
    return [number for child in children for number in take(child, rest)]


def command_of(page: str) -> str:
    """Returns the first command of a page, without what continues it on other lines."""
    commands = [line.strip() for line in page.splitlines() if COMMAND.match(line)]
    return commands[0].removesuffix("\\").strip().removeprefix(".venv/bin/")


def ledger() -> str:
    """Returns the page."""
    rows = []
    for path in sorted(FOLDER.glob("*/claims.json")):
        folder = path.parent
        page = (folder / "README.md").read_text()
        title = page.splitlines()[0].removeprefix("# ")
        for claim in read(folder):
            rows.append(
                f"| [{title}]({folder.name}/README.md) | {claim['predicted']} | "
                f"{claim['verdict']} | {claim['measured']} | `{command_of(page)}` |"
            )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    LEDGER.write_text(ledger())
    print(f"{LEDGER}: {ledger().count(chr(10)) - HEAD.count(chr(10))} claims", file=sys.stderr)
