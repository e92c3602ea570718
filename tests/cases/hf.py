"""Tiny checkpoints in the layout of released models, with what the reference computes.

They were made with transformers 5.23.0 and torch 2.13.0, in float32 and with random weights.
`reference.npz` has the inputs and outputs.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from cases.tokenizers import CORPUS, write_json_tokenizer
from moejax.config import resolve
from moejax.interop.hf.save import save_model
from moejax.models import Decoder

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


def write_released(folder, **sections):
    """Writes a small random model, as Mixtral's are stored, with a tokenizer of 320 ids."""
    sections = {
        "model": {
            "num_layers": 2,
            "d_model": 32,
            "d_ff": 32,
            "vocab_size": 320,
            "tied_embeddings": False,
            "embedding_multiplier": 1.0,
        },
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 16, "z_weight": 0.0},
    } | sections
    config = resolve(sections | {"data": {"tokenizer": "bytes", "seq_len": 64}})
    save_model(Decoder(config, rngs=nnx.Rngs(params=0)), folder, "mixtral")
    write_json_tokenizer(folder)
    return folder


def write_texts(folder, num_files=40):
    """Writes text files of random words; returns the pattern of their paths."""
    folder.mkdir()
    words = " ".join(CORPUS).split()
    rng = np.random.default_rng(0)
    for number in range(num_files):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 200)))
    return f"{folder}/*.txt"
