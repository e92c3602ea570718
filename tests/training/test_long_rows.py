"""Train steps on rows that attend in several blocks: the same on a mesh, in a pack, and over all
scores.
"""

import dataclasses

import jax
import numpy as np
import pytest

from cases.training import make, packed_batch, small_config
from moejax.config import Knobs
from moejax.nn.attention import attend as attention
from moejax.nn.attention import causal_blocks as causal
from moejax.training.packed.arms import Pack
from moejax.training.program import WITH_NORMS
from moejax.training.step import make_train_step, put_batch

LENGTH = 64
SCALARS = ("loss/total", "grad_norm")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of 64 are cut as rows of 2,048 are."""
    monkeypatch.setattr(causal, "SMALLEST", 4)
    monkeypatch.setattr(causal, "LEAST_SKIPPED", 8)


def config_of(seed=0, **mesh):
    return small_config(
        data={"seq_len": LENGTH},
        mesh={"data": 1} | mesh,
        model={"remat": True, "num_layers": 2},
        train={"seed": seed},
    )


def batch_of(config, document):
    """Rows of documents of one length; the last one is cut off."""
    batch = jax.device_get(packed_batch(config))
    places_BL = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), batch.segments_BL.shape)
    return dataclasses.replace(
        batch, segments_BL=1 + places_BL // document, positions_BL=places_BL % document
    )


def step(config, num_devices, document):
    """A step's scalars and parameters."""
    setup = make(config, num_devices)
    with jax.set_mesh(setup.mesh):
        state = setup.init(config.train.seed)
        batch = put_batch(batch_of(config, document), setup)
        state, output = make_train_step(setup)(state, batch, Knobs.from_config(config))
    return {name: float(output.scalars[name]) for name in SCALARS}, jax.device_get(state.params)


@pytest.fixture(scope="module")
def by_document():
    """One device; documents of 5 leave blocks out, those of 40 do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "SMALLEST", 4)
        patch.setattr(causal, "LEAST_SKIPPED", 8)
        return {document: step(config_of(), 1, document) for document in (5, 40)}


def assert_is_close(found, expected):
    for name in SCALARS:
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("document", [5, 40])
def test_blocks_equal_all_scores_within_a_model(by_document, monkeypatch, document):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert_is_close(step(config_of(), 1, document), by_document[document])


@pytest.mark.slow
@pytest.mark.parametrize("document", [5, 40])
@pytest.mark.parametrize(
    "mesh",
    [{"data": 2, "tensor": 2}, {"data": 2, "expert": 4}],
    ids=str,
)
def test_blocks_on_a_mesh_equal_one_device(by_document, mesh, document):
    assert_is_close(
        step(config_of(**mesh), int(np.prod(list(mesh.values()))), document), by_document[document]
    )


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [({"data": 2}, 4), ({}, 1)],
    ids=["apart", "together"],
)
@pytest.mark.slow
def test_arms_of_a_pack_with_near_and_far_documents_equal_each_alone(
    by_document, mesh, num_devices
):
    """Arms on one device are one `vmap`, which leaves blocks out for all of them or for none."""
    configs = [config_of(**mesh), config_of(**mesh)]
    pack = Pack(configs, jax.devices()[:num_devices])
    batches = [
        batch_of(config, document) for config, document in zip(configs, (5, 40), strict=True)
    ]
    with jax.set_mesh(pack.mesh):
        state = pack.join(setup.init(0) for setup in pack.setups)
        compiled = pack.compile_step(state, pack.put_batches(batches))
        state, output = compiled(state, pack.put_batches(batches), pack.knobs, WITH_NORMS)
    assert "conditional(" in compiled.as_text()
    states = list(pack.split(state, range(2)))
    for arm, document in enumerate((5, 40)):
        scalars = {name: float(pack.outputs(output)[arm].scalars[name]) for name in SCALARS}
        assert_is_close((scalars, jax.device_get(states[arm].params)), by_document[document])
