"""Tiny checkpoints in the layout of released models, with what the reference computes.

They were made with transformers 5.23.0 and torch 2.13.0, in float32 and with random weights.
`reference.npz` has the inputs and outputs.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "data" / "hf"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
"""Names of folders, of which some are further models of a family."""


QUICK = {"gpt_oss", "llama4_text", "longcat_flash", "mixtral"}
"""Those that `make test` compares; together they have most of what the others have."""


def each_family():
    """Returns the folders as parameters, of which those that are not quick are marked slow."""
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES
    ]


def model_type(family):
    """Returns what `config.json` calls the family of a folder."""
    return json.loads((FOLDER / family / "config.json").read_text())["model_type"]


@functools.cache
def reference(family):
    """Returns the arrays of the reference by name."""
    with np.load(FOLDER / family / "reference.npz") as arrays:
        return dict(arrays)
