"""Arms of a sweep in one program: each computes, saves and continues as it does alone."""

import contextlib
import dataclasses
import json
import math
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from cases.training import case_config, make, packed_batch, replace, small_config
from moejax.config import LOSS_SPECS, LOSS_WEIGHTS, ConfigError, Knobs, to_dict
from moejax.inspection.runs.run import open_run
from moejax.sweeps.arms import plan_arms
from moejax.sweeps.packing import pack_arms
from moejax.training import loop
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.checkpoints.meta import saved_steps
from moejax.training.eval_step import make_eval_step
from moejax.training.evaluation import EvaluationSums, eval_inputs
from moejax.training.health.alarms import AlarmError, read_alarms
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed.arms import Pack, depends_on_devices, program_of, trains_alone
from moejax.training.packed.train import train_packed
from moejax.training.program import WITH_NORMS
from moejax.training.run import common_step
from moejax.training.run_directory.metrics import Recorder
from moejax.training.run_directory.routing_log import read_routing
from moejax.training.step import make_train_step, put_batch

TRAIN = {
    "num_steps": 50,
    "log_every": 5,
    "eval_every": 25,
    "checkpoint_every": 10,
    "keep_checkpoints": 9,
}
ARMS = [
    {"train": {"seed": 0}, "moe": {"balance_weight": 0.1}},
    {"train": {"seed": 1}, "moe": {"balance_weight": 0.02, "z_weight": 0.1}},
    {"train": {"seed": 0}, "moe": {"bias_rate": 0.05}, "optimizer": {"learning_rate": 1e-3}},
]
MOE = {"selection_bias": True, "bias_rate": 1e-3, "jitter": 0.1}


def arm_configs(tmp_path, **train_leaves):
    return [
        small_config(
            moe=MOE | arm.get("moe", {}),
            optimizer={"learning_rate": 3e-3} | arm.get("optimizer", {}),
            train=TRAIN | train_leaves | arm["train"],
            data={"directory": str(tmp_path / "data")},
        )
        for arm in ARMS
    ]


def lines_of(workdir):
    """`metrics.jsonl` without what is measured in seconds."""
    return [without_times(line) for line in all_lines_of(workdir)]


def all_lines_of(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(line):
    return {key: value for key, value in line.items() if not key.startswith("perf/")}


def assert_lines_are_close(found, expected, rtol=1e-5):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, expected_line in zip(found, expected, strict=True):
        assert line.keys() == expected_line.keys()
        for key, expected_value in expected_line.items():
            value = line[key]
            is_close = math.isclose(value, expected_value, rel_tol=rtol, abs_tol=rtol)
            assert is_close, (line["step"], key, value, expected_value)


def assert_states_are_close(found, expected, rtol=1e-5):
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, wanted), value in zip(expected_leaves, jax.tree.leaves(found), strict=True):
        wanted = np.asarray(wanted, np.float64)
        value = np.asarray(value, np.float64)
        scale = max(np.abs(wanted).max(), 1e-8)
        largest_error = np.abs(value - wanted).max()
        assert largest_error <= rtol * scale, jax.tree_util.keystr(path)


def assert_losses_are_close(found, expected):
    """Compares the losses of the checkpoints, by which the best one is kept."""
    losses, expected_losses = saved_losses(found), saved_losses(expected)
    assert losses.keys() == expected_losses.keys()
    assert {"25", "50"} <= losses.keys() and "30" not in losses
    for step, values in expected_losses.items():
        assert losses[step] == pytest.approx(values, rel=1e-5)


def saved_losses(workdir):
    paths = workdir.glob("checkpoints/*/metrics/metrics")
    return {path.parts[-3]: json.loads(path.read_text()) for path in paths}


def copy_with_steps(workdir, folder, steps):
    """Copies a run directory with these checkpoints only."""
    shutil.copytree(workdir, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name not in steps:
            shutil.rmtree(path)
    return folder


def newest_state(config, workdir):
    setup = make(config)
    with (
        Checkpoints(workdir, setup, read_only=True) as checkpoints,
        jax.set_mesh(setup.mesh),
    ):
        return jax.device_get(checkpoints.restore())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three arms trained side by side on two devices, of whose four slots one is filled up."""
    folder = tmp_path_factory.mktemp("packed")
    configs = arm_configs(folder)
    workdirs = [folder / f"arm{i}" for i in range(3)]
    results = train_packed(configs, workdirs, command="packed", devices=jax.devices()[:2])
    return configs, workdirs, results


@pytest.mark.parametrize("arm", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_arm_of_a_pack_writes_what_it_writes_alone_after_50_steps(packed, arm, tmp_path):
    configs, workdirs, results = packed
    alone = configs[arm]  # on all eight devices
    expected = train(alone, tmp_path / "alone")
    assert (results[arm].step, results[arm].stopped_by, results[arm].error) == (50, None, None)
    assert results[arm].evaluation.loss == pytest.approx(expected.evaluation.loss, rel=1e-5)
    assert_lines_are_close(lines_of(workdirs[arm]), lines_of(tmp_path / "alone"))
    state = newest_state(alone, workdirs[arm])
    expected_state = newest_state(alone, tmp_path / "alone")
    assert_states_are_close(state, expected_state, rtol=1e-4)
    assert_losses_are_close(workdirs[arm], tmp_path / "alone")
    found, wanted = read_routing(workdirs[arm]), read_routing(tmp_path / "alone")
    np.testing.assert_array_equal(found.steps, wanted.steps)
    for name in ("counts", "probs", "bias", "idle_steps", "importance", "layers"):
        array, expected_array = found.read(name), wanted.read(name)
        np.testing.assert_allclose(array, expected_array, rtol=1e-4, atol=1e-5, err_msg=name)
    files = [
        "config.json",
        "checkpoints",
        "tokenizer.json",
        "routing/evaluations/50.npz",
        "alarms.jsonl",
    ]
    for name in files:
        assert (workdirs[arm] / name).exists() == (tmp_path / "alone" / name).exists(), name


def test_arms_of_a_pack_differ_and_a_run_directory_opens_like_any_other(packed):
    _, workdirs, results = packed
    losses = [result.evaluation.loss for result in results]
    assert len(set(losses)) == 3
    assert open_run(workdirs[0]).config["train"]["num_steps"] == 50


@pytest.mark.slow
def test_a_pack_that_was_stopped_continues_exactly(packed, tmp_path):
    configs, workdirs, _ = packed
    again = [tmp_path / f"arm{i}" for i in range(3)]

    def train_until(step=None):
        stop = StopSignals()
        with _stop_at(step, stop):
            results = train_packed(configs, again, stop=stop, devices=jax.devices()[:2])
        last = results[0].step
        assert all(result.stopped_by == "TEST" for result in results)
        assert all(result.step == last for result in results)
        assert all(saved_steps(workdir)[-1] == last for workdir in again)
        return last

    first = train_until(step=19)
    # One arm's newest checkpoint is lost, as if the process had been killed between two saves.
    shutil.rmtree(again[1] / "checkpoints" / str(first))
    assert 10 < train_until(step=14) < first  # before what the other arms had saved
    assert train_until() == 25  # while step 25 is evaluated
    assert not (again[1] / "checkpoints/25/metrics/metrics").exists()
    train_packed(configs, again, devices=jax.devices()[:2])
    for config, stopped, straight in zip(configs, again, workdirs, strict=True):
        assert lines_of(stopped) == lines_of(straight)
        assert read_alarms(stopped) == read_alarms(straight)
        state, expected_state = newest_state(config, stopped), newest_state(config, straight)
        assert_states_are_close(state, expected_state, rtol=0)


@pytest.mark.slow
def test_an_arm_of_a_pack_continues_alone_and_a_run_continues_in_a_pack(packed, tmp_path):
    configs, workdirs, _ = packed
    first, second = tmp_path / "arm0", tmp_path / "arm1"
    shutil.copytree(workdirs[0], first)
    for step in saved_steps(first):
        if step > 30:
            shutil.rmtree(first / f"checkpoints/{step}")
    train(configs[0], first)
    assert_lines_are_close(lines_of(first), lines_of(workdirs[0]))
    longer = [replace(config, "train", num_steps=60) for config in configs[:2]]
    shutil.copytree(workdirs[1], second)
    results = train_packed(longer, [first, second], devices=jax.devices()[:1])
    assert [result.step for result in results] == [60, 60]
    assert lines_of(second)[-1]["step"] == 60


@contextlib.contextmanager
def _stop_at(step, stop):
    """Requests a stop once that step is done, or during an evaluation if it is None."""
    add_step, add_batch = Recorder.add, EvaluationSums.add

    def add_step_and_stop(self, output):
        finished = add_step(self, output)
        if step is not None and finished.step >= step:
            stop.request("TEST")
        return finished

    def add_batch_and_stop(self, output):
        add_batch(self, output)
        if step is None:
            stop.request("TEST")

    adding_steps = mock.patch.object(Recorder, "add", add_step_and_stop)
    adding_batches = mock.patch.object(EvaluationSums, "add", add_batch_and_stop)
    with adding_steps, adding_batches:
        yield


def test_arms_without_checkpoints_of_a_common_step_do_not_start_again(packed, tmp_path):
    configs, workdirs, _ = packed
    first = copy_with_steps(workdirs[0], tmp_path / "arm0", ["50"])
    second = copy_with_steps(workdirs[1], tmp_path / "arm1", ["40"])
    message = r"no common step \(.*arm0: \[50\]; .*arm1: \[40\]\); train them apart"
    with pytest.raises(CheckpointError, match=message):
        train_packed(configs[:2], [first, second])
    assert lines_of(first) == lines_of(workdirs[0])
    with pytest.raises(ConfigError, match="2 arms have 1 workdirs"):
        train_packed(configs[:2], [first])


def resume_and_stop(configs, folders, caplog):
    """Continues a pack that is to stop at once; returns the lines of its log."""
    caplog.clear()
    stop = StopSignals()
    stop.request("SIGTERM")
    with caplog.at_level("INFO", logger="moejax"):
        train_packed(configs, folders, stop=stop, devices=jax.devices()[:2])
    return [record.getMessage() for record in caplog.records]


def test_a_pack_reports_which_checkpoints_of_its_arms_are_lost(packed, tmp_path, caplog):
    configs, workdirs, _ = packed
    folders = [copy_with_steps(workdirs[arm], tmp_path / f"arm{arm}", []) for arm in (0, 1)]
    messages = resume_and_stop(configs[:2], folders, caplog)
    lost = "has metrics and no checkpoint: the run begins at step 0"
    assert sum(lost in message for message in messages) == 2
    assert not any("is removed" in message for message in messages)
    # What a stop before the first step has saved is no reason to refuse an arm without it.
    assert [saved_steps(folder) for folder in folders] == [[0], [0]]
    shutil.rmtree(folders[0] / "checkpoints")
    assert not any("continuing" in text for text in resume_and_stop(configs[:2], folders, caplog))


def test_a_pack_reports_which_checkpoints_of_its_arms_it_removes(packed, tmp_path, caplog):
    configs, workdirs, _ = packed
    first = copy_with_steps(workdirs[0], tmp_path / "arm0", ["40", "50"])
    second = copy_with_steps(workdirs[1], tmp_path / "arm1", ["40"])
    messages = resume_and_stop(configs[:2], [first, second], caplog)
    removed = [message for message in messages if "is removed" in message]
    assert removed == [f"{first}/checkpoints/50 is removed: the run goes on from step 40"]
    assert not any("has metrics and no checkpoint" in message for message in messages)


def test_arms_that_are_beyond_their_last_step_report_their_losses(packed, tmp_path, caplog):
    configs, workdirs, results = packed
    folders = [tmp_path / "arm0", tmp_path / "arm1"]
    for workdir, folder in zip(workdirs[:2], folders, strict=True):
        shutil.copytree(workdir, folder)
    shorter = [replace(config, "train", num_steps=45) for config in configs[:2]]
    with caplog.at_level("INFO", logger="moejax"):
        again = train_packed(shorter, folders, devices=jax.devices()[:2])
    assert caplog.text.count("continuing with train.num_steps=45 (was 50)") == 2
    for arm in (0, 1):
        assert again[arm].step == 50
        assert again[arm].evaluation.loss == pytest.approx(results[arm].evaluation.loss, rel=1e-6)
        assert lines_of(folders[arm]) == lines_of(workdirs[arm])


@pytest.mark.slow
def test_arms_that_cannot_go_on_end_and_the_others_do_not_notice(tmp_path):
    leaves = {
        "num_steps": 12,
        "log_every": 2,
        "eval_every": 6,
        "checkpoint_every": 6,
        "max_nonfinite_steps": 2,
    }
    configs = arm_configs(tmp_path, **leaves)
    configs = [replace(config, "train", step_limit_s=100.0) for config in configs]
    configs[0] = replace(configs[0], "alarms", logits=1e-6, stop="logits")
    configs[1] = replace(configs[1], "optimizer", learning_rate=1e30)
    configs[1] = replace(configs[1], "moe", balance_weight=1e30)
    workdirs = [tmp_path / f"arm{i}" for i in range(3)]
    ended = []

    def on_end(index, result):
        """The files of an arm are complete at once, and the others have not ended."""
        last_step = lines_of(workdirs[index])[-1]["step"]
        ended.append((index, result, last_step, saved_steps(workdirs[index])))
        assert not (workdirs[2] / "checkpoints/12").exists()

    with mock.patch.object(loop, "Watchdog", wraps=loop.Watchdog) as watchdog:
        alarmed, broken, sound = train_packed(
            configs, workdirs, devices=jax.devices()[:1], on_end=on_end
        )
    assert watchdog.call_args.args[0] == 300  # three arms on one device
    assert ended == [(1, broken, broken.step, []), (0, alarmed, 5, [5])]
    assert isinstance(broken.error, NonFiniteError) and "2 steps in a row" in str(broken.error)
    assert broken.evaluation is None and broken.step < 6
    assert not (workdirs[1] / "checkpoints/6").exists()
    assert isinstance(alarmed.error, AlarmError) and alarmed.evaluation is None
    with pytest.raises(AlarmError) as alone:
        train(configs[0], tmp_path / "alone")
    assert str(alarmed.error) == str(alone.value)
    assert_lines_are_close(lines_of(workdirs[0]), lines_of(tmp_path / "alone"))
    assert saved_steps(workdirs[0]) == saved_steps(tmp_path / "alone") == [alarmed.step] == [5]
    assert (sound.error, sound.step) == (None, 12)
    lines = all_lines_of(workdirs[2])
    assert lines[-1]["step"] == 12
    assert {line.get("perf/arms") for line in lines if "perf/tokens_per_s" in line} == {3}
    assert {line.get("perf/arms") for line in lines if "eval/loss" in line} == {None}


KNOB_CASES = {
    "noisy_topk": {
        "importance_weight": 0.3,
        "load_weight": 0.05,
        "vmoe_importance_weight": 0.2,
        "vmoe_load_weight": 0.3,
        "noise_scale": 0.5,
    },
    "switch": {"capacity_factor": 0.7, "jitter": 0.3, "balance_weight": 0.5, "z_weight": 0.5},
    "sigmoid_topk": {"bias_rate": 0.2, "sequence_balance_weight": 0.3, "expert_dropout": 0.4},
}
for _name, _spec in LOSS_SPECS.items():
    if not any(f"{_name}_weight" in case for case in KNOB_CASES.values()):
        _router = next(router for router in KNOB_CASES if router in _spec.routers)
        KNOB_CASES[_router][f"{_name}_weight"] = 0.3


OF_TRAINING = {"sigmoid_topk": {"logit_z_weight": 0.2}}
"""Knobs of the section `train`, by router."""


@pytest.mark.slow
@pytest.mark.parametrize("router", KNOB_CASES)
def test_every_knob_acts_in_its_own_arm_alone(router):
    # What one arm has, the other must have, too, or no program fits both.
    moe = {weight: 0.1 for weight in LOSS_WEIGHTS if weight in KNOB_CASES[router]}
    if "expert_dropout" in KNOB_CASES[router]:
        moe["expert_dropout"] = 0.1
    model = {"remat": False}  # compiles faster
    configs = [
        case_config(router, moe=moe, model=model),
        case_config(
            router,
            moe=moe | KNOB_CASES[router],
            model=model,
            train={"seed": 3} | OF_TRAINING.get(router, {}),
        ),
    ]
    pack = Pack(configs, jax.devices()[:2])
    batches = [packed_batch(config, seed=i) for i, config in enumerate(configs)]
    with jax.set_mesh(pack.mesh):
        first = [jax.device_get(pack.setups[0].init(config.train.seed)) for config in configs]
        state = pack.join(first)
        step = pack.compile_step(state, pack.put_batches(batches))
        for _ in range(2):
            state, output = step(state, pack.put_batches(batches), pack.knobs, WITH_NORMS)
    states = list(pack.split(state, range(len(configs))))
    outputs = pack.outputs(output)
    setup = make(configs[0])
    alone_step = make_train_step(setup)  # once for all arms, which differ in knobs only
    for arm, config in enumerate(configs):
        knobs = Knobs.from_config(config)
        with jax.set_mesh(setup.mesh):
            alone = jax.device_put(first[arm], setup.shardings)
            for _ in range(2):
                alone, expected = alone_step(alone, put_batch(batches[arm], setup), knobs)
        scalars = jax.device_get(expected.scalars)
        assert outputs[arm].scalars.keys() == scalars.keys()
        for name, value in scalars.items():
            assert outputs[arm].scalars[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
        assert_states_are_close(states[arm].params, alone.params, rtol=1e-4)


def test_the_cases_of_knobs_leave_none_out():
    tried = set().union(*KNOB_CASES.values(), *OF_TRAINING.values()) | {"seed", "learning_rate"}
    assert tried == {field.name for field in dataclasses.fields(Knobs)}


@pytest.mark.slow
def test_arms_within_a_mesh_of_their_own_equal_one_device():
    mesh = {"data": 2, "expert": 2}
    configs = [small_config(mesh=mesh, train={"seed": seed}) for seed in (0, 1, 2)]
    pack = Pack(configs)  # two arms on each four devices
    assert dict(pack.mesh.shape) | {"arms": 2, "data": 2, "expert": 2} == dict(pack.mesh.shape)
    batches = [packed_batch(config, seed=i) for i, config in enumerate(configs)]
    with jax.set_mesh(pack.mesh):
        arms = zip(pack.setups, configs, strict=True)
        state = pack.join(setup.init(config.train.seed) for setup, config in arms)
        step = pack.compile_step(state, pack.put_batches(batches))
        state, output = step(state, pack.put_batches(batches), pack.knobs, WITH_NORMS)
        inputs = [pack.put_batch(x) for x in eval_inputs(batches[0], None)]
        eval_step = pack.make_eval_step(0)
        evaluated = jax.device_get(eval_step(state.params, state.router_state, *inputs))
    setup = make(replace(configs[0], "mesh", data=1, expert=1))
    # Once for all arms: the seed is a knob.
    one_device_step = make_train_step(setup)
    one_device_eval = make_eval_step(setup)
    states = jax.device_get(list(pack.split(state, range(3))))
    outputs = pack.outputs(output)
    for arm, config in enumerate(configs):
        with jax.set_mesh(setup.mesh):
            batch = put_batch(batches[arm], setup)
            initial = setup.init(config.train.seed)
            alone, expected = one_device_step(initial, batch, Knobs.from_config(config))
            inputs = [put_batch(x, setup) for x in eval_inputs(batches[0], None)]
            loss = one_device_eval(alone.params, alone.router_state, *inputs).sums.nats
        assert evaluated.sums.nats[arm] == pytest.approx(float(loss), rel=1e-5)
        assert_states_are_close(states[arm].params, jax.device_get(alone.params), rtol=1e-4)
        for name, value in jax.device_get(expected.scalars).items():
            found = outputs[arm].scalars[name]
            assert found == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_arms_that_split_batch_and_matrices_train_apart():
    """The compiler would end this process by SIGABRT."""
    for mesh in ({"data": 2, "tensor": 2}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}):
        configs = [small_config(mesh={"data": 1} | mesh, train={"seed": seed}) for seed in (0, 1)]
        message = r"mesh.tensor=2 together with another axis .* train the arms apart"
        with pytest.raises(ConfigError, match=message):
            Pack(configs)
        assert trains_alone(configs[0]) and len(Pack(configs[:1]).setups) == 1
        plan = plan_arms(to_dict(configs[0]), [{"train.seed": seed} for seed in (0, 1)])
        assert [len(ids) for ids in pack_arms(plan.arms, 8)] == [1, 1]
    for mesh in ({"tensor": 2}, {"context": 2, "tensor": 2}):
        Pack([small_config(mesh={"data": 1} | mesh, train={"seed": seed}) for seed in (0, 1)])


def test_arms_that_depend_on_the_number_of_devices_train_apart():
    moe = {"balance_scope": "device"}
    configs = [small_config(moe=moe, train={"seed": seed}) for seed in (0, 1)]
    assert depends_on_devices(configs[0]) and not depends_on_devices(small_config())
    message = r"moe.balance_scope=device, .* a mesh axis of -1 leaves open"
    with pytest.raises(ConfigError, match=message):
        Pack(configs, jax.devices()[:2])
    assert len(Pack(configs[:1], jax.devices()[:2]).setups) == 1
    Pack([replace(config, "mesh", data=1) for config in configs], jax.devices()[:2])
    slots = {"dispatch": "capacity", "capacity_group": "device"}
    assert depends_on_devices(small_config(moe=slots))
    assert not depends_on_devices(small_config(moe={"dispatch": "capacity"}))


@pytest.mark.parametrize(
    ("one", "other", "is_one_program"),
    [
        ({"train": {"seed": 1}}, {"train": {"seed": 2}}, True),
        ({"moe": {"balance_weight": 0.1}}, {"moe": {"balance_weight": 0.2}}, True),
        ({"moe": {"balance_weight": 0.1}}, {"moe": {"balance_weight": 0.0}}, False),
        ({"moe": {"num_experts": 4}}, {"moe": {"num_experts": 8}}, False),
        (
            {"moe": {"capacity_factor": 1.0, "dispatch": "capacity"}},
            {"moe": {"capacity_factor": 2.0, "dispatch": "capacity"}},
            True,
        ),
        ({"optimizer": {"learning_rate": 1e-3}}, {"optimizer": {"learning_rate": 1e-2}}, True),
        ({"optimizer": {"weight_decay": 0.1}}, {"optimizer": {"weight_decay": 0.2}}, False),
        ({"train": {"num_steps": 5}}, {"train": {"num_steps": 6}}, False),
        ({"alarms": {"drops": 0.5}}, {"alarms": {"drops": 0.2}}, True),
    ],
)
def test_arms_share_a_program_if_only_knobs_seeds_or_alarms_differ(one, other, is_one_program):
    configs = [small_config(**one), small_config(**other)]
    assert (program_of(configs[0]) == program_of(configs[1])) == is_one_program
    if is_one_program:
        return
    (section,) = one
    (leaf,) = set(one[section]) - {"dispatch"}
    values = f"{one[section][leaf]} in arm 0 and {other[section][leaf]} in arm 1"
    with pytest.raises(ConfigError, match=f"{section}.{leaf} is {values}; arms of a"):
        Pack(configs, jax.devices()[:1])


@pytest.mark.parametrize(
    ("steps", "common"),
    [([[10, 20], [20, 10]], 20), ([[10, 20], [10]], 10), ([[20], [10]], 0), ([[], [10]], 0)],
)
def test_a_pack_continues_from_the_newest_step_that_all_arms_have(steps, common):
    assert common_step(steps) == common
