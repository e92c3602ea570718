"""Runs as they are loaded for use: on one device, or over a mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.training import make, small_config
from moejax.config import MeshConfig
from moejax.data import prepare
from moejax.inference.load import load_run
from moejax.models.parameters import count_parameters
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.run_directory.layout import write_run_directory

B, L = 8, 16


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was saved before its first step."""
    folder = tmp_path_factory.mktemp("load")
    config = small_config(data={"directory": str(folder / "data")}, mesh={"data": 1})
    setup = make(config)
    corpus = prepare(config.data)
    corpus.tokenizer.save(folder / "run")
    write_run_directory(
        folder / "run", config, count_parameters(config), corpus.directory.name, "test"
    )
    with Checkpoints(folder / "run", setup) as checkpoints:
        checkpoints.save(setup.init(0))
    return folder / "run"


def logits(loaded, context):
    """Returns the logits of random rows, computed within `context`."""
    drawn_BL = np.random.default_rng(0).integers(0, loaded.tokenizer.vocab_size, (B, L))
    tokens_BL = jnp.asarray(drawn_BL, jnp.int32)
    segments_BL = jnp.ones((B, L), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    graphdef, state = nnx.split(loaded.model)

    @jax.jit
    def forward(state, *rows):
        logits_BLV, _ = nnx.merge(graphdef, state)(*rows)
        return logits_BLV

    with context:
        return forward(state, tokens_BL, segments_BL, positions_BL)


def test_a_run_loaded_over_a_mesh_gives_the_same_in_its_context_and_outside(workdir):
    alone = load_run(workdir)
    split = load_run(workdir, mesh=MeshConfig(data=2, expert=4))
    assert alone.mesh is None and dict(split.mesh.shape)["expert"] == 4
    expected = logits(alone, contextlib.nullcontext())
    first_array = jax.tree.leaves(nnx.state(split.model))[0]
    assert len(first_array.sharding.device_set) == 8
    for context in (contextlib.nullcontext(), jax.set_mesh(split.mesh)):
        oracle.assert_close(logits(split, context), expected, rtol=1e-5)
