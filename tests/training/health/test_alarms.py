"""Alarms: each rule holds exactly beyond its threshold and is reported once.

What a rule has counted survives a resume, and a rule can stop a run.
"""

import dataclasses
import json
import logging
import math
import re

import numpy as np
import pytest

from moejax.config import AlarmConfig, ConfigError, resolve
from moejax.config.sections.alarms import RULES
from moejax.training import loop
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.meta import saved_steps
from moejax.training.health.alarm_rules import check
from moejax.training.health.alarms import (
    AlarmError,
    AlarmFileError,
    AlarmLog,
    active,
    name_layers,
    read_alarms,
)
from moejax.training.health.telemetry import LAYER_METRICS, RoutingInterval
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals

N, E, K = 3, 8, 2
CONFIG = resolve(
    {
        "model": {"num_layers": 4},
        "moe": {"num_experts": E, "top_k": K, "first_dense": 1},
        "alarms": {"dead_experts": 100, "stop": "collapse, logits"},
    }
)
"""MoE layers 1, 2 and 3."""


def healthy(**changes):
    """An interval in which no rule holds; `changes` replace arrays, or metrics of each layer."""
    layers = {name: np.zeros(N) for name in LAYER_METRICS}
    layers["entropy"] = np.full(N, 1.5)
    layers["logit_max"] = np.full(N, 4.0)
    arrays = {
        "counts_NE": np.full((N, E), 10),
        "choices_N": np.full(N, float(K)),
        "probs_NE": np.full((N, E), 1 / E),
        "importance_NE": np.full((N, E), 1 / E),
        "idle_steps_NE": np.zeros((N, E), np.int32),
        "bias_NE": None,
    }
    for name, value in changes.items():
        if name in LAYER_METRICS:
            layers[name] = np.array(value, float)
        else:
            arrays[name] = value
    return RoutingInterval(layers=layers, **arrays)


def idle(steps):
    idle_NE = np.zeros((N, E), np.int32)
    idle_NE[1, 5] = steps
    return idle_NE


def probs_against_load(product):
    """Probabilities that give layer 1 the loss `product` = E * p_0 with all load on expert 0."""
    probs_NE = np.full((N, E), 1 / E)
    probs_NE[1] = (1 - product / E) / (E - 1)
    probs_NE[1, 0] = product / E
    return probs_NE


def load_on_expert_0():
    counts_NE = np.full((N, E), 10)
    counts_NE[1] = 0
    counts_NE[1, 0] = 80
    return counts_NE


# Thresholds: 0.6 of E / K - 1 = 3; 100 steps; 0.9; 100; 0.01; 0.3; 0.02 * ln 8.
CASES = {
    "collapse": ({"max_violation": [0, 1.79, 0]}, {"max_violation": [0, 1.83, 0]}, 0.61, "61%"),
    "dead_experts": ({"idle_steps_NE": idle(100)}, {"idle_steps_NE": idle(101)}, 101, "101 steps"),
    "balance_floor": (
        {"counts_NE": load_on_expert_0(), "probs_NE": probs_against_load(0.91)},
        {"counts_NE": load_on_expert_0(), "probs_NE": probs_against_load(0.89)},
        0.89,
        "0.890",
    ),
    "logits": ({"logit_max": [4, 99.0, 4]}, {"logit_max": [4, 101.0, 4]}, 101, "101.0"),
    "ties": ({"ties": [0, 0.009, 0]}, {"ties": [0, 0.05, 0]}, 0.05, "5.00%"),
    "drops": ({"dropped": [0, 0.29, 0]}, {"dropped": [0, 0.31, 0]}, 0.31, "31.0%"),
    "entropy": (
        {"entropy": [1.5, 0.021 * math.log(E), 1.5]},
        {"entropy": [1.5, 0.019 * math.log(E), 1.5]},
        0.019,
        "1.90%",
    ),
}


def test_there_is_a_case_for_every_rule_and_a_healthy_interval_raises_none():
    leaves = {field.name for field in dataclasses.fields(AlarmConfig)}
    assert set(CASES) == set(RULES) == leaves - {"stop"}
    assert check(healthy(), CONFIG) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_beyond_its_threshold_in_the_layer_concerned(rule):
    before, beyond, value, shown = CASES[rule]
    assert check(healthy(**before), CONFIG) == []
    (alarm,) = check(healthy(**beyond), CONFIG)
    assert (alarm.rule, alarm.layers) == (rule, (2,))
    assert alarm.value == pytest.approx(value) and shown in alarm.reading
    assert alarm.threshold == getattr(CONFIG.alarms, rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_of_0_switches_a_rule_off(rule):
    off = dataclasses.replace(CONFIG, alarms=dataclasses.replace(CONFIG.alarms, **{rule: 0}))
    assert check(healthy(**CASES[rule][1]), off) == []


def test_logits_that_are_not_finite_are_an_alarm_without_a_value(tmp_path):
    alarm_log = AlarmLog(tmp_path, 0, CONFIG)
    (alarm,) = alarm_log.update(10, healthy(logit_max=[4, math.nan, math.nan]))
    assert alarm.layers == (2, 3) and "not finite" in alarm.reading
    (line,) = read_alarms(tmp_path)
    assert line["layers"] == [2, 3] and "value" not in line


def test_layers_in_which_every_token_visits_every_expert_cannot_collapse():
    every_expert = np.array([E, E, 0.0])
    interval = healthy(max_violation=[0.0, 1e-7, 0.0], choices_N=every_expert)
    assert check(interval, CONFIG) == []


def test_what_can_collapse_follows_the_experts_that_tokens_had():
    # Of one expert a token, MaxVio may reach 7, and 2 is 29 %; of two, 3, and 2 is 67 %.
    few = healthy(max_violation=[2, 2, 2], choices_N=np.array([1.0, 2.0, 1.0]))
    (alarm,) = check(few, CONFIG)
    assert alarm.layers == (2,) and alarm.value == pytest.approx(2 / 3)


def test_what_lasts_is_reported_once_when_it_begins_and_once_when_it_ends(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="moejax")
    alarm_log = AlarmLog(tmp_path, 0, CONFIG)
    in_2, in_both = healthy(dropped=[0, 0.5, 0]), healthy(dropped=[0, 0.75, 0.5])
    none = healthy()
    intervals = [in_2, in_2, in_both, none, in_2, none, none, none, none]
    for step, interval in enumerate(intervals):
        alarm_log.update(step, interval)
    assert [(line["step"], line["state"], line["layers"]) for line in read_alarms(tmp_path)] == [
        (0, "on", [2]),
        (2, "on", [3]),
        (5, "off", [3]),  # quiet in the intervals 3, 4 and 5
        (7, "off", [2]),
    ]
    assert [record.message for record in caplog.records][:2] == [
        "step 0: alarm drops in layer 2: 50.0% of choices found no slot",
        "step 2: alarm drops in layer 3: 50.0% of choices found no slot",
    ]


def test_collapse_begins_once_it_has_lasted(tmp_path):
    alarm_log = AlarmLog(tmp_path, 0, CONFIG)
    in_2 = healthy(max_violation=[0, 2, 0])
    in_both = healthy(max_violation=[0, 2, 2])
    intervals = [in_2, in_2, healthy(), in_2, in_both, in_both, in_both, healthy(), in_2]
    stopping = [len(alarm_log.update(step, interval)) for step, interval in enumerate(intervals)]
    assert [(line["step"], line["layers"]) for line in read_alarms(tmp_path)] == [
        (5, [2]),
        (6, [3]),
    ]
    assert stopping == [0, 0, 0, 0, 0, 1, 1, 0, 1]  # once it has begun, it holds at once again


def test_a_resumed_run_drops_later_lines_and_repeats_no_alarm_that_holds(tmp_path):
    alarm_log = AlarmLog(tmp_path, 0, CONFIG)
    alarm_log.update(10, healthy(dropped=[0, 1, 0]))
    alarm_log.update(20, healthy(dropped=[1, 1, 0]))
    resumed = AlarmLog(tmp_path, 10, CONFIG)
    assert active(read_alarms(tmp_path)) == [("drops", 2)]
    resumed.update(20, healthy(dropped=[1, 1, 0]))
    assert [(line["step"], line["layers"]) for line in read_alarms(tmp_path)] == [
        (10, [2]),
        (20, [1]),
    ]


def test_only_rules_that_are_to_stop_a_run_are_returned(tmp_path):
    alarm_log = AlarmLog(tmp_path, 0, CONFIG)
    assert alarm_log.update(10, healthy(dropped=[1, 1, 1])) == []
    (alarm,) = alarm_log.update(20, healthy(logit_max=[999, 3, 3]))
    assert alarm.rule == "logits"


def test_a_line_that_a_crash_cut_off_is_left_out_and_damage_is_named(tmp_path):
    AlarmLog(tmp_path, 0, CONFIG).update(10, healthy(dropped=[0, 1, 0]))
    path = tmp_path / "alarms.jsonl"
    text = path.read_text()
    path.write_text(text + text[:20])
    assert len(read_alarms(tmp_path)) == 1
    fields = '"step": 1, "rule": "ties", "state": "on", "layers"'
    damaged = [
        '{"step": 1}',
        f"{{{fields}: [1e999]}}",
        f'{{{fields}: ["1", 2]}}',
        f"{{{fields}: {'[' * 100_000}",
    ]
    for line in damaged:
        path.write_text(f"{line}\n{text}")
        with pytest.raises(AlarmFileError, match=r"alarms\.jsonl: line 1 is damaged"):
            read_alarms(tmp_path)


def test_many_layers_are_named_by_the_first_and_their_number():
    assert name_layers([4]) == "layer 4"
    assert name_layers(list(range(20))) == "layers 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


@pytest.mark.parametrize(
    ("alarms", "message"),
    [
        ({"stop": "colapse"}, "alarms.stop='colapse' names 'colapse'; use some of collapse, "),
        ({"stop": "ties", "ties": 0.0}, "names ties, which alarms.ties=0 switches off"),
        ({"drops": 1.5}, "alarms.drops=1.5 must be at least 0 and at most 1"),
        ({"logits": -1.0}, "alarms.logits=-1.0 must be at least 0"),
        ({"entropy": math.nan}, "alarms.entropy=nan must be"),
    ],
)
def test_thresholds_that_cannot_work_are_refused(alarms, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve({"alarms": alarms})


def noting(calls, name, function):
    """Wraps a function so that its returns are noted."""

    def noted(*arguments):
        try:
            return function(*arguments)
        finally:
            calls.append(name)

    return noted


@pytest.mark.parametrize("log_every", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_rule_that_stops_a_run_saves_it_and_lets_it_go_on_without_the_rule(
    tmp_path, monkeypatch, log_every
):
    """This holds also if the only interval is written at the end of the run."""
    calls = []
    for where, name in ((Checkpoints, "save"), (Checkpoints, "wait"), (loop, "raise_on_all")):
        monkeypatch.setattr(where, name, noting(calls, name, getattr(where, name)))
    sections = {
        "model": {"num_layers": 1, "d_model": 16, "d_ff": 16},
        "attention": {"num_heads": 2, "num_kv_heads": 1},
        "moe": {
            "num_experts": 4,
            "top_k": 1,
            "renormalize": False,
            "d_expert": 8,
            "balance_weight": 0.0,
        },
        "data": {
            "source": "synthetic",
            "tokenizer": "bytes",
            "seq_len": 16,
            "directory": str(tmp_path / "data"),
        },
        "train": {"num_steps": 12, "batch_size": 8, "log_every": log_every, "eval_every": 0},
        # A router that learns anything falls below the entropy of a uniform one.
        "alarms": {"entropy": 1.0, "collapse": 0.0, "stop": "entropy"},
    }
    stop = StopSignals()
    with pytest.raises(
        AlarmError, match=r"entropy in layer 0: .* saved step \d+; take entropy out of alarms\.stop"
    ):
        train(resolve(sections), tmp_path / "run", stop=stop)
    assert not stop  # it is the caller's, whose other runs go on
    # Of several processes none waits for the disk once the error is raised.
    last_save = len(calls) - 1 - calls[::-1].index("save")
    assert calls[last_save:][:3] == ["save", "wait", "raise_on_all"]
    (line,) = read_alarms(tmp_path / "run")
    last_saved = saved_steps(tmp_path / "run")[-1]
    assert line["step"] <= last_saved and (last_saved < 12) == (log_every == 2)
    without_stop = sections | {"alarms": {"entropy": 1.0, "collapse": 0.0}}
    result = train(resolve(without_stop), tmp_path / "run")
    assert result.step == 12 and result.evaluation is not None
    assert read_alarms(tmp_path / "run") == [line]
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["alarms"]["stop"] == ""


def test_a_continued_run_reports_the_same_alarms_for_it_keeps_its_counts(tmp_path):
    bad, good = healthy(max_violation=[0, 1.9, 0]), healthy()
    intervals = [good, bad, bad, bad, bad, good, good, good, good, bad]
    (tmp_path / "straight").mkdir()
    straight = AlarmLog(tmp_path / "straight", 0, CONFIG)
    update_all(straight, intervals, first_step=1)
    expected = read_alarms(tmp_path / "straight")
    assert [(line["step"], line["state"]) for line in expected] == [(4, "on"), (8, "off")]
    for stop in range(1, len(intervals)):
        workdir = tmp_path / str(stop)
        workdir.mkdir()
        first = AlarmLog(workdir, 0, CONFIG)
        update_all(first, intervals[:stop], first_step=1)
        counts = json.loads(json.dumps(first.counts))  # as a checkpoint keeps them
        second = AlarmLog(workdir, stop, CONFIG, counts)
        update_all(second, intervals[stop:], first_step=stop + 1)
        assert read_alarms(workdir) == expected, stop


def update_all(alarm_log, intervals, first_step):
    for step, interval in enumerate(intervals, start=first_step):
        alarm_log.update(step, interval)
