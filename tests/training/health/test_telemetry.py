"""Telemetry: what a logging interval keeps of its steps, and that files hold it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from cases import training as cases
from moejax.config import Knobs
from moejax.moe.balancing.metrics import routing_metrics
from moejax.training.health.speed import median_speed
from moejax.training.health.telemetry import LAYER_METRICS, NORMS, summarize_routing
from moejax.training.run_directory.metrics import MetricsFile, Recorder
from moejax.training.run_directory.routing_log import RoutingLog
from moejax.training.step import make_train_step, put_batch

LAYERS = {
    "model": {"num_layers": 3},
    "moe": {"per_layer": "1: router=sigmoid_topk selection_bias=True"},
}


@pytest.fixture(scope="module")
def outputs():
    """Three steps of a model of which one layer has a selection bias."""
    config = cases.small_config(**LAYERS)
    setup = cases.make(config)
    step, state = make_train_step(setup), cases.initial_state(setup)
    found = []
    with jax.set_mesh(setup.mesh):
        for seed in range(3):
            batch = put_batch(cases.packed_batch(config, seed), setup)
            state, output = step(state, batch, Knobs.from_config(config))
            found.append(jax.device_get(output))
    return config, found


def test_the_names_that_are_logged_are_those_of_the_metrics(outputs):
    _, steps = outputs
    measured = routing_metrics(jax.tree.map(jnp.asarray, steps[0].routing))
    assert set(LAYER_METRICS) == set(measured) == set(steps[0].layers)


def test_an_interval_sums_counts_and_weights_probabilities_by_tokens(outputs):
    _, steps = outputs
    interval = summarize_routing(steps)
    for n in range(3):
        tokens = sum(float(step.routing.num_tokens[n]) for step in steps)
        for e in range(4):
            count = sum(int(step.routing.assignments_E[n, e]) for step in steps)
            prob = sum(float(step.routing.probs_E[n, e]) for step in steps) / tokens
            weight = sum(float(step.routing.importance_E[n, e]) for step in steps) / tokens
            assert interval.counts_NE[n, e] == count
            assert interval.probs_NE[n, e] == pytest.approx(prob)
            assert interval.importance_NE[n, e] == pytest.approx(weight)
    np.testing.assert_allclose(interval.probs_NE.sum(axis=1), 1, rtol=1e-5)


def test_an_interval_keeps_the_idle_steps_of_its_last_step(outputs):
    _, steps = outputs
    idle_steps_NE = np.arange(12, dtype=np.int32).reshape(3, 4)
    last = dataclasses.replace(steps[-1], state={"idle_steps": idle_steps_NE})
    interval = summarize_routing([steps[0], last])
    np.testing.assert_array_equal(interval.idle_steps_NE, idle_steps_NE)


def test_only_layers_with_a_selection_bias_have_one(outputs):
    interval = summarize_routing(outputs[1])
    assert np.isnan(interval.bias_NE[[0, 2]]).all()
    assert np.abs(interval.bias_NE[1]).max() > 0


def test_metrics_of_a_layer_are_means_and_the_largest_logit_is_the_largest(outputs):
    _, steps = outputs
    interval = summarize_routing(steps)
    for name in LAYER_METRICS:
        columns = np.stack([s.layers[name] for s in steps])
        expected = columns.max(axis=0) if name == "logit_max" else columns.mean(axis=0)
        np.testing.assert_allclose(
            interval.layers[name], expected, rtol=1e-6, atol=1e-7, err_msg=name
        )


def test_steps_that_are_not_finite_are_left_out_of_means_only(outputs):
    _, steps = outputs
    layers = {name: value_N * np.nan for name, value_N in steps[1].layers.items()}
    broken = dataclasses.replace(steps[1], layers=layers)
    interval = summarize_routing([steps[0], broken])
    np.testing.assert_allclose(interval.layers["entropy"], steps[0].layers["entropy"], rtol=1e-6)
    assert np.isnan(interval.layers["logit_max"]).all()
    assert np.isnan(summarize_routing([broken]).layers["entropy"]).all()


def test_a_layer_that_was_not_finite_in_a_step_leaves_it_out_of_its_sums(outputs):
    _, steps = outputs
    probs_NE = np.array(steps[1].routing.probs_E)
    probs_NE[1] = np.nan
    routing = dataclasses.replace(steps[1].routing, probs_E=probs_NE)
    broken = dataclasses.replace(steps[1], routing=routing)
    found = summarize_routing([steps[0], broken])
    both = summarize_routing(steps[:2])
    first = summarize_routing(steps[:1])
    for name in ("counts_NE", "probs_NE", "importance_NE", "choices_N"):
        value = getattr(found, name)
        np.testing.assert_allclose(value[[0, 2]], getattr(both, name)[[0, 2]], err_msg=name)
        np.testing.assert_allclose(value[1], getattr(first, name)[1], err_msg=name)
    assert np.isnan(summarize_routing([broken]).probs_NE[1]).all()


def test_the_files_hold_what_the_steps_did_one_interval_late(tmp_path, outputs):
    config, steps = outputs
    log = RoutingLog(tmp_path, config.moe_layers, config.moe.num_choices, LAYER_METRICS)
    with MetricsFile(tmp_path, 0) as metrics:
        recorder = Recorder(metrics, log, 0)
        for output in steps:
            recorder.add(output)
        recorder.flush()
    expected = summarize_routing(steps).arrays()
    assert set(expected) == {
        "counts", "probs", "importance", "idle_steps", "bias", "layers", *NORMS,
    }  # fmt: skip
    for name, value in expected.items():
        spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/routing/{name}/"}
        stored = tensorstore.open(spec).result()
        np.testing.assert_array_equal(stored[0].read().result(), value, err_msg=name)


def written(folder, steps, **known):
    """The line that a recorder writes of some steps."""
    with MetricsFile(folder, 0) as metrics:
        recorder = Recorder(metrics, None, 0, **known)
        for output in steps:
            recorder.add(output)
        recorder.flush()
    return json.loads((folder / "metrics.jsonl").read_text())


def test_seconds_are_logged_and_what_the_device_reports(tmp_path, outputs, monkeypatch):
    _, steps = outputs
    (tmp_path / "known").mkdir()
    line = written(tmp_path, steps)
    assert line["perf/tokens_per_s"] * line["perf/seconds"] == pytest.approx(line["tokens"])
    assert "perf/mfu" not in line and "perf/peak_bytes" not in line  # on CPU
    monkeypatch.setattr("moejax.training.run_directory.metrics.peak_memory_bytes", lambda: 123)
    line = written(tmp_path / "known", steps, utilisation=0.25)
    assert line["perf/mfu"] == pytest.approx(0.25 * line["perf/tokens_per_s"])
    assert line["perf/peak_bytes"] == 123


def test_the_speed_of_a_run_is_the_median_of_its_intervals():
    assert median_speed([100.0, 1.0, np.nan, np.inf, 3.0]) == 3.0
    assert median_speed([]) is None and median_speed([np.nan]) is None


def test_a_dense_model_has_no_routing():
    config = cases.small_config(moe={"num_experts": 0}, model={"num_layers": 1})
    setup = cases.make(config)
    with jax.set_mesh(setup.mesh):
        batch = put_batch(cases.packed_batch(config), setup)
        _, output = jax.eval_shape(
            make_train_step(setup), cases.initial_state(setup), batch, Knobs.from_config(config)
        )
    assert output.layers == {} and output.state == {}
    assert summarize_routing([output]) is None
