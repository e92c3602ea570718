"""Every recipe of `configs/routers/`, as a point: what it changes in `softmax_topk.py`.

  moejax sweep --config=experiments/routers/sweep.py --dir=runs/routers
  python experiments/routers/analysis.py

A single one, whose row is then written beside the others:

  moejax sweep --config=experiments/routers/sweep.py:hash --dir=runs/router_hash
  python experiments/routers/analysis.py runs/router_hash

README.md beside this file has the question, what was predicted, and the answer.
"""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

FOLDER = Path(__file__).parents[2] / "configs/routers"


def get_config(name: str = "") -> ConfigDict:
    """Returns the recipe that points change; `name` is for `sweep` alone."""
    return read_recipe("softmax_topk")


def sweep(name: str = "") -> Iterator[dict[str, Any]]:
    """Yields the point of a recipe, or of each."""
    points = read_points()
    yield from [points[name]] if name else points.values()


def read_points() -> dict[str, dict[str, Any]]:
    """Returns the leaves in which each recipe differs from the one that points change."""
    base = read_recipe("softmax_topk")
    points = {}
    for path in sorted(FOLDER.glob("*.py")):
        points[path.stem] = differing_leaves(base, read_recipe(path.stem))
    return points


def read_recipe(name: str) -> ConfigDict:
    """Returns the configuration of a recipe."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]()


def differing_leaves(base: ConfigDict, recipe: ConfigDict) -> dict[str, Any]:
    """Returns the leaves of a recipe that differ from those of another, by dotted key."""
    point = {}
    for section, leaves in recipe.to_dict().items():
        for leaf, value in leaves.items():
            if value != base[section][leaf]:
                point[f"{section}.{leaf}"] = value
    return point
