"""Loss by domain: the mean over the targets of each domain's documents, whatever the mesh."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cases import training as cases
from moejax.data import Corpus
from moejax.data.labels import Labels
from moejax.data.tokenizers import ByteTokenizer
from moejax.training.evaluation import domains_of, evaluate
from moejax.training.program import Program

DOMAINS = Labels((), ("code", "drama", "empty"), np.array([0, 1, 1, 0, 0], np.int32))


def batches(config):
    """Two batches whose rows hold two documents each."""
    found = []
    for seed in range(2):
        batch = cases.packed_batch(config, seed)
        rows = np.arange(len(batch.tokens_BL))[:, None]
        documents_BL = np.where(batch.segments_BL == 1, rows % 5, (3 * rows + 1) % 5)
        documents_BL = np.where(batch.segments_BL > 0, documents_BL, -1)
        found.append(dataclasses.replace(batch, documents_BL=documents_BL))
    return found


def expected_loss_by_domain(config, logits):
    """The mean loss and the number of targets of each domain, target by target."""
    nats, number = {"code": 0.0, "drama": 0.0}, {"code": 0, "drama": 0}
    for batch, logits_BLV in zip(batches(config), logits, strict=True):
        nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
        for b, position in np.argwhere(batch.loss_mask_BL):
            document = batch.documents_BL[b, position]
            domain = DOMAINS.domains[DOMAINS.domain_of_document[document]]
            nats[domain] += float(nats_BL[b, position])
            number[domain] += 1
    return {domain: nats[domain] / number[domain] for domain in nats}, number


@pytest.mark.parametrize(
    ("num_experts", "mesh"),
    [
        (0, {"data": 1}),
        (4, {"data": 2, "expert": 2}),
        pytest.param(4, {"data": 1}, marks=pytest.mark.slow),
        pytest.param(0, {"data": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_loss_of_a_domain_is_the_mean_over_its_targets_on_any_mesh(mesh, num_experts):
    config = cases.small_config(
        mesh=mesh, moe={"num_experts": num_experts}, model={"num_layers": 1}
    )
    setup = cases.make(config, math.prod(mesh.values()))
    state = cases.initial_state(setup)
    with jax.set_mesh(setup.mesh):
        program = Program(setup)
        (evaluation,) = evaluate(
            program,
            program.make_eval_step(3),
            state.params,
            state.router_state,
            iter(batches(config)),
            100,
            domains=DOMAINS,
        )
        model = nnx.merge(setup.graphdef, state.params, state.router_state)
        logits = []
        for batch in batches(config):
            inputs = (batch.tokens_BL, batch.segments_BL, batch.positions_BL)
            hidden_BLD, *_ = model(*map(jnp.asarray, inputs))
            logits.append(jax.device_get(model.logits(hidden_BLD)))
    expected, number = expected_loss_by_domain(config, logits)
    found = evaluation.loss_by_domain
    assert found.keys() == expected.keys()  # none for a domain without targets
    for domain, loss in expected.items():
        assert found[domain] == pytest.approx(loss, rel=1e-5)
        assert evaluation.scalars()[f"eval/loss/{domain}"] == found[domain]
    weighted = sum(found[domain] * number[domain] for domain in found) / sum(number.values())
    assert evaluation.loss == pytest.approx(weighted, rel=1e-5)


def test_one_batch_is_evaluated_at_a_time():
    config = cases.small_config(mesh={"data": 2}, model={"num_layers": 1})
    setup = cases.make(config, 2)
    state = cases.initial_state(setup)
    program = Program(setup)
    real_step = program.make_eval_step(0)
    was_ready, outputs = [], []

    @jax.jit
    def after_a_while(nats):
        matrix = jax.lax.fori_loop(0, 300, lambda _, x: x @ x / 600, jnp.ones((600, 600)))
        return nats + 0 * matrix[0, 0]

    def slow_step(params, router_state, batch):
        if outputs:
            was_ready.append(outputs[-1].sums.nats.is_ready())
        output = real_step(params, router_state, batch)
        sums = dataclasses.replace(output.sums, nats=after_a_while(output.sums.nats))
        outputs.append(dataclasses.replace(output, sums=sums))
        return outputs[-1]

    every = [cases.packed_batch(config, seed) for seed in range(3)]
    with jax.set_mesh(setup.mesh):
        evaluate(program, slow_step, state.params, state.router_state, iter(every), 100)
    assert was_ready == [True, True]


def test_the_probe_is_the_first_row_of_batches_spread_over_the_split(monkeypatch):
    monkeypatch.setattr("moejax.training.evaluation.PROBE_ROWS", 4)
    config = cases.small_config(moe={"num_experts": 4}, model={"num_layers": 2})
    setup = cases.make(config, 1)
    state = cases.initial_state(setup)
    every = [cases.packed_batch(config, seed) for seed in range(11)]
    with jax.set_mesh(setup.mesh):
        program = Program(setup)
        step = program.make_eval_step(0)

        def probe(batches):
            arrays = (state.params, state.router_state)
            (evaluation,) = evaluate(program, step, *arrays, iter(batches), 100)
            return evaluation.probe_NTK

        alone = [probe([batch]) for batch in every]
        shape = (2, every[0].tokens_BL.shape[1], config.moe.top_k)
        assert all(probe_NTK.shape == shape for probe_NTK in alone)
        assert not np.array_equal(alone[0], alone[4])  # otherwise the order would not show
        chosen_of = {1: [0], 4: [0, 1, 2, 3], 5: [0, 2, 4], 8: [0, 2, 4, 6], 11: [0, 4, 8]}
        for number, chosen in chosen_of.items():
            expected_NTK = np.concatenate([alone[i] for i in chosen], axis=1)
            np.testing.assert_array_equal(probe(every[:number]), expected_NTK)


def test_without_several_domains_there_is_no_loss_by_domain(monkeypatch):
    corpus = Corpus(ByteTokenizer(), 16, {}, {}, {}, {"validation": 5}, Path("nowhere"))
    names = tuple(str(number) for number in range(40))
    many = Labels((), names, np.arange(40, dtype=np.int32))
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "labels", lambda self, split: DOMAINS)
        assert domains_of(corpus) is DOMAINS
        patch.setattr(Corpus, "labels", lambda self, split: many)
        assert len(domains_of(corpus).domains) == 16
    assert domains_of(corpus) is None  # it has no file of labels
