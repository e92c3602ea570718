"""Arms of a sweep in one program: each gives what it gives alone, is saved alone, and continues exactly."""

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
from moejax.config import ConfigError, Knobs, to_dict
from moejax.inspection.runs.run import open_run
from moejax.sweeps.arms import plan_arms
from moejax.sweeps.packing import pack_arms
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.checkpoints.meta import saved_steps
from moejax.training.eval_step import make_eval_step
from moejax.training.evaluation import EvaluationSums, eval_inputs
from moejax.training.health.alarms import AlarmError, read_alarms
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed import loop as packed_loop
from moejax.training.packed.arms import Pack, depends_on_devices, program_of, trains_alone
from moejax.training.packed.loop import common_step, train_packed
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
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def assert_lines_are_close(found, expected, rtol=1e-5):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert math.isclose(one[key], value, rel_tol=rtol, abs_tol=rtol), (
                other["step"],
                key,
                one[key],
                value,
            )


def assert_states_are_close(found, expected, rtol=1e-5):
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, wanted), value in leaves:
        wanted, value = np.asarray(wanted, np.float64), np.asarray(value, np.float64)
        scale = max(np.abs(wanted).max(), 1e-8)
        assert np.abs(value - wanted).max() <= rtol * scale, jax.tree_util.keystr(path)


def assert_losses_are_close(found, expected):
    """Of the checkpoints: the best is kept by them."""
    losses = [
        {
            path.parts[-3]: json.loads(path.read_text())
            for path in workdir.glob("checkpoints/*/metrics/metrics")
        }
        for workdir in (found, expected)
    ]
    assert (
        losses[0].keys() == losses[1].keys()
        and {"25", "50"} <= losses[0].keys()
        and "30" not in losses[0]
    )
    for step, values in losses[1].items():
        assert losses[0][step] == pytest.approx(values, rel=1e-5)


def newest_state(config, workdir):
    setup = make(config)
    with (
        Checkpoints(workdir, setup, read_only=True) as checkpoints,
        jax.set_mesh(setup.mesh),
    ):
        return jax.device_get(checkpoints.restore())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three arms trained side by side on two devices, which one lane fills up."""
    folder = tmp_path_factory.mktemp("packed")
    configs = arm_configs(folder)
    workdirs = [folder / f"arm{i}" for i in range(3)]
    results = train_packed(configs, workdirs, command="packed", devices=jax.devices()[:2])
    return configs, workdirs, results


@pytest.mark.parametrize("arm", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_arm_of_a_pack_leaves_what_it_leaves_alone_after_50_steps(packed, arm, tmp_path):
    configs, workdirs, results = packed
    alone = configs[arm]  # on all eight devices
    expected = train(alone, tmp_path / "alone")
    assert (results[arm].step, results[arm].stopped_by, results[arm].error) == (50, None, None)
    assert results[arm].evaluation.loss == pytest.approx(expected.evaluation.loss, rel=1e-5)
    assert_lines_are_close(lines_of(workdirs[arm]), lines_of(tmp_path / "alone"))
    assert_states_are_close(
        newest_state(alone, workdirs[arm]), newest_state(alone, tmp_path / "alone"), rtol=1e-4
    )
    assert_losses_are_close(workdirs[arm], tmp_path / "alone")
    found, wanted = read_routing(workdirs[arm]), read_routing(tmp_path / "alone")
    np.testing.assert_array_equal(found.steps, wanted.steps)
    for name in ("counts", "probs", "bias", "idle_steps", "importance", "layers"):
        np.testing.assert_allclose(
            found.read(name), wanted.read(name), rtol=1e-4, atol=1e-5, err_msg=name
        )
    for name in (
        "config.json",
        "checkpoints",
        "tokenizer.json",
        "routing/evaluations/50.npz",
        "alarms.jsonl",
    ):
        assert (workdirs[arm] / name).exists() == (tmp_path / "alone" / name).exists(), name


def test_arms_of_a_pack_differ_and_a_run_directory_opens_like_any_other(packed):
    _, workdirs, results = packed
    losses = [result.evaluation.loss for result in results]
    assert len(set(losses)) == 3
    assert open_run(workdirs[0]).config["train"]["num_steps"] == 50


def test_a_pack_that_was_stopped_continues_exactly_as_if_it_had_not_been(packed, tmp_path):
    configs, workdirs, _ = packed
    again = [tmp_path / f"arm{i}" for i in range(3)]

    def train_until(step=None):
        stop = StopSignals()
        with _stop_at(step, stop):
            results = train_packed(configs, again, stop=stop, devices=jax.devices()[:2])
        assert {result.stopped_by for result in results} == {"TEST"}
        assert len({result.step for result in results}) == 1
        assert {tuple(saved_steps(workdir)[-1:]) for workdir in again} == {(results[0].step,)}
        return results[0].step

    first = train_until(step=19)
    # One arm's newest checkpoint is lost, as if the process had been killed between two saves.
    shutil.rmtree(again[1] / "checkpoints" / str(first))
    assert 10 < train_until(step=14) < first  # before what the other arms had saved
    assert train_until() == 25  # while step 25 is evaluated
    assert not (again[1] / "checkpoints/25/metrics/metrics").exists()
    train_packed(configs, again, devices=jax.devices()[:2])
    for config, one, other in zip(configs, again, workdirs, strict=True):
        assert lines_of(one) == lines_of(other)
        assert read_alarms(one) == read_alarms(other)
        assert_states_are_close(newest_state(config, one), newest_state(config, other), rtol=0)


@pytest.mark.slow
def test_an_arm_of_a_pack_continues_alone_and_a_run_continues_in_a_pack(packed, tmp_path):
    configs, workdirs, _ = packed
    shutil.copytree(workdirs[0], tmp_path / "arm0")
    for path in (tmp_path / "arm0/checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 30:
            shutil.rmtree(path)
    train(configs[0], tmp_path / "arm0")
    assert_lines_are_close(lines_of(tmp_path / "arm0"), lines_of(workdirs[0]))
    longer = [replace(config, "train", num_steps=60) for config in configs[:2]]
    shutil.copytree(workdirs[1], tmp_path / "arm1")
    results = train_packed(
        longer, [tmp_path / "arm0", tmp_path / "arm1"], devices=jax.devices()[:1]
    )
    assert [result.step for result in results] == [60, 60]
    assert lines_of(tmp_path / "arm1")[-1]["step"] == 60


@contextlib.contextmanager
def _stop_at(step, stop):
    """Asks for a stop once that step is done; None: during an evaluation."""
    add_step, add_batch = Recorder.add_finished, EvaluationSums.add

    def add_step_and_stop(self, output):
        finished = add_step(self, output)
        if step is not None and finished.step >= step:
            stop.request("TEST")
        return finished

    def add_batch_and_stop(self, output):
        add_batch(self, output)
        if step is None:
            stop.request("TEST")

    adding_steps = mock.patch.object(Recorder, "add_finished", add_step_and_stop)
    with adding_steps, mock.patch.object(EvaluationSums, "add", add_batch_and_stop):
        yield


def test_arms_without_a_checkpoint_of_a_common_step_are_not_begun_anew(packed, tmp_path):
    configs, workdirs, _ = packed
    for arm, kept in ((0, "50"), (1, "40")):
        shutil.copytree(workdirs[arm], tmp_path / f"arm{arm}")
        for path in (tmp_path / f"arm{arm}/checkpoints").iterdir():
            if path.name != kept:
                shutil.rmtree(path)
    with pytest.raises(
        CheckpointError,
        match=r"no common step \(.*arm0: \[50\]; .*arm1: \[40\]\); train them apart",
    ):
        train_packed(configs[:2], [tmp_path / "arm0", tmp_path / "arm1"])
    assert lines_of(tmp_path / "arm0") == lines_of(workdirs[0])
    with pytest.raises(ConfigError, match="2 arms have 1 workdirs"):
        train_packed(configs[:2], [tmp_path / "arm0"])


def test_a_pack_says_what_of_its_arms_is_lost_or_removed(packed, tmp_path, caplog):
    configs, workdirs, _ = packed
    for case, kept in (("lost", {0: [], 1: []}), ("removed", {0: ["40", "50"], 1: ["40"]})):
        caplog.clear()
        folders = [tmp_path / case / f"arm{arm}" for arm in kept]
        for folder, steps, arm in zip(folders, kept.values(), kept, strict=True):
            shutil.copytree(workdirs[arm], folder)
            for path in (folder / "checkpoints").iterdir():
                if path.name not in steps:
                    shutil.rmtree(path)
        stop = StopSignals()
        stop.request("SIGTERM")
        with caplog.at_level("INFO", logger="moejax"):
            train_packed(configs[:2], folders, stop=stop, devices=jax.devices()[:2])
        said = [record.getMessage() for record in caplog.records]
        lost = [
            line
            for line in said
            if "has metrics and no checkpoint: the run begins at step 0" in line
        ]
        assert len(lost) == (2 if case == "lost" else 0)
        removed = [
            line for line in said if line.endswith("is removed: the run goes on from step 40")
        ]
        assert removed == (
            [] if case == "lost" else [f"{folders[0]}/checkpoints/50 {removed[0].split(' ', 1)[1]}"]
        )


def test_arms_that_are_beyond_their_last_step_tell_their_losses(packed, tmp_path, caplog):
    configs, workdirs, results = packed
    for arm in (0, 1):
        shutil.copytree(workdirs[arm], tmp_path / f"arm{arm}")
    shorter = [replace(config, "train", num_steps=45) for config in configs[:2]]
    with caplog.at_level("INFO", logger="moejax"):
        again = train_packed(
            shorter, [tmp_path / "arm0", tmp_path / "arm1"], devices=jax.devices()[:2]
        )
    assert caplog.text.count("continuing with train.num_steps=45 (was 50)") == 2
    for arm in (0, 1):
        assert again[arm].step == 50
        assert again[arm].evaluation.loss == pytest.approx(results[arm].evaluation.loss, rel=1e-6)
        assert lines_of(tmp_path / f"arm{arm}") == lines_of(workdirs[arm])


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
    configs[1] = replace(
        replace(configs[1], "optimizer", learning_rate=1e30), "moe", balance_weight=1e30
    )
    workdirs, ended = [tmp_path / f"arm{i}" for i in range(3)], []

    def on_end(index, result):
        """What an arm leaves behind is there at once, and the others have not ended."""
        ended.append(
            (index, result, lines_of(workdirs[index])[-1]["step"], saved_steps(workdirs[index]))
        )
        assert not (workdirs[2] / "checkpoints/12").exists()

    with mock.patch.object(packed_loop, "Watchdog", wraps=packed_loop.Watchdog) as watchdog:
        alarmed, broken, sound = train_packed(
            configs, workdirs, devices=jax.devices()[:1], on_end=on_end
        )
    assert watchdog.call_args.args[0] == 300  # three arms on one device
    assert ended == [(1, broken, broken.step, []), (0, alarmed, 5, [5])]
    assert isinstance(broken.error, NonFiniteError) and "2 steps in a row" in str(broken.error)
    assert broken.evaluation is None and broken.step < 6
    assert not (tmp_path / "arm1/checkpoints/6").exists()
    assert isinstance(alarmed.error, AlarmError) and alarmed.evaluation is None
    with pytest.raises(AlarmError) as alone:
        train(configs[0], tmp_path / "alone")
    assert str(alarmed.error) == str(alone.value)
    assert_lines_are_close(lines_of(workdirs[0]), lines_of(tmp_path / "alone"))
    assert saved_steps(workdirs[0]) == saved_steps(tmp_path / "alone") == [alarmed.step] == [5]
    assert (sound.error, sound.step) == (None, 12)
    assert lines_of(tmp_path / "arm2")[-1]["step"] == 12
    intervals = [
        json.loads(line) for line in (workdirs[2] / "metrics.jsonl").read_text().splitlines()
    ]
    assert {line.get("perf/arms") for line in intervals if "perf/tokens_per_s" in line} == {3}
    assert {line.get("perf/arms") for line in intervals if "eval/loss" in line} == {None}


KNOB_CASES = {
    "noisy_topk": {
        "importance_weight": 0.3, "load_weight": 0.05, "vmoe_importance_weight": 0.2, "vmoe_load_weight": 0.3,
        "noise_scale": 0.5,
    },
    "switch": {"capacity_factor": 0.7, "jitter": 0.3, "balance_weight": 0.5, "z_weight": 0.5},
    "sigmoid_topk": {"bias_rate": 0.2, "sequence_balance_weight": 0.3, "expert_dropout": 0.4},
}  # fmt: skip


@pytest.mark.parametrize("router", KNOB_CASES)
def test_every_knob_acts_in_its_own_arm_alone(router):
    moe = {"expert_dropout": 0.1} if "expert_dropout" in KNOB_CASES[router] else {}
    model = {"remat": False}  # compiles faster
    configs = [
        case_config(router, moe=moe, model=model),
        case_config(router, moe=moe | KNOB_CASES[router], model=model, train={"seed": 3}),
    ]
    pack = Pack(configs, jax.devices()[:2])
    batches = [packed_batch(config, seed=i) for i, config in enumerate(configs)]
    with jax.set_mesh(pack.mesh):
        first = [jax.device_get(pack.trainables[0].init(config.train.seed)) for config in configs]
        state = pack.join(first)
        step = pack.compile_step(state, pack.put_batches(batches))
        for _ in range(2):
            state, output = step(state, pack.put_batches(batches), pack.knobs)
    states, outputs = list(pack.split(state, range(len(configs)))), pack.outputs(output)
    for arm, config in enumerate(configs):
        setup = make(config)
        with jax.set_mesh(setup.mesh):
            alone, alone_step = (
                jax.device_put(first[arm], setup.shardings),
                make_train_step(setup),
            )
            for _ in range(2):
                alone, expected = alone_step(
                    alone, put_batch(batches[arm], setup), Knobs.from_config(config)
                )
        scalars = jax.device_get(expected.scalars)
        assert outputs[arm].scalars.keys() == scalars.keys()
        for name, value in scalars.items():
            assert outputs[arm].scalars[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
        assert_states_are_close(states[arm].params, alone.params, rtol=1e-4)


def test_the_cases_of_knobs_leave_none_out():
    tried = {name for leaves in KNOB_CASES.values() for name in leaves} | {"seed", "learning_rate"}
    assert tried == {field.name for field in dataclasses.fields(Knobs)}


def test_arms_within_a_mesh_of_their_own_equal_one_device():
    mesh = {"data": 2, "expert": 2}
    configs = [small_config(mesh=mesh, train={"seed": seed}) for seed in (0, 1, 2)]
    pack = Pack(configs)  # two arms on each four devices
    assert dict(pack.mesh.shape) | {"arms": 2, "data": 2, "expert": 2} == dict(pack.mesh.shape)
    batches = [packed_batch(config, seed=i) for i, config in enumerate(configs)]
    with jax.set_mesh(pack.mesh):
        state = pack.join(
            setup.init(c.train.seed) for setup, c in zip(pack.trainables, configs, strict=True)
        )
        step = pack.compile_step(state, pack.put_batches(batches))
        state, output = step(state, pack.put_batches(batches), pack.knobs)
        inputs = (pack.put_batch(x) for x in eval_inputs(batches[0], None))
        evaluated = jax.device_get(
            pack.make_eval_step(0)(state.params, state.router_state, *inputs)
        )
    setup = make(replace(configs[0], "mesh", data=1, expert=1))
    one_device_step, one_device_eval = (
        make_train_step(setup),
        make_eval_step(setup),
    )  # the seed is a knob
    states = list(pack.split(state, range(3)))
    for arm, config in enumerate(configs):
        with jax.set_mesh(setup.mesh):
            arguments = (
                setup.init(config.train.seed),
                put_batch(batches[arm], setup),
                Knobs.from_config(config),
            )
            alone, expected = one_device_step(*arguments)
            inputs = (put_batch(x, setup) for x in eval_inputs(batches[0], None))
            loss = one_device_eval(alone.params, alone.router_state, *inputs).sums.nats
        assert evaluated.sums.nats[arm] == pytest.approx(float(loss), rel=1e-5)
        assert_states_are_close(
            jax.device_get(states[arm].params), jax.device_get(alone.params), rtol=1e-4
        )
        for name, value in jax.device_get(expected.scalars).items():
            assert pack.outputs(output)[arm].scalars[name] == pytest.approx(
                value, rel=1e-5, abs=1e-6
            ), name


def test_arms_that_split_batch_and_matrices_train_apart():
    """The compiler would end this process by SIGABRT."""
    for mesh in ({"data": 2, "tensor": 2}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}):
        configs = [small_config(mesh={"data": 1} | mesh, train={"seed": seed}) for seed in (0, 1)]
        with pytest.raises(
            ConfigError, match=r"mesh.tensor=2 beside another axis .* train the arms apart"
        ):
            Pack(configs)
        assert trains_alone(configs[0]) and len(Pack(configs[:1]).trainables) == 1
        plan = plan_arms(to_dict(configs[0]), [{"train.seed": seed} for seed in (0, 1)])
        assert [len(ids) for ids in pack_arms(plan.arms, 8)] == [1, 1]
    for mesh in ({"tensor": 2}, {"context": 2, "tensor": 2}):
        Pack([small_config(mesh={"data": 1} | mesh, train={"seed": seed}) for seed in (0, 1)])


def test_arms_whose_results_depend_on_how_many_devices_there_are_train_apart():
    moe = {"balance_scope": "device"}
    configs = [small_config(moe=moe, train={"seed": seed}) for seed in (0, 1)]
    assert depends_on_devices(configs[0]) and not depends_on_devices(small_config())
    with pytest.raises(
        ConfigError, match=r"moe.balance_scope=device, .* a mesh axis of -1 leaves open"
    ):
        Pack(configs, jax.devices()[:2])
    assert len(Pack(configs[:1], jax.devices()[:2]).trainables) == 1
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
def test_arms_share_a_program_if_only_knobs_seeds_and_alarms_differ(one, other, is_one_program):
    configs = [small_config(**one), small_config(**other)]
    assert (program_of(configs[0]) == program_of(configs[1])) == is_one_program
    if not is_one_program:
        (section,) = one
        (leaf,) = set(one[section]) - {"dispatch"}
        message = f"{section}.{leaf} is {one[section][leaf]} in arm 0 and {other[section][leaf]} in arm 1; arms of a"
        with pytest.raises(ConfigError, match=message):
            Pack(configs, jax.devices()[:1])


@pytest.mark.parametrize(
    ("steps", "common"),
    [([[10, 20], [20, 10]], 20), ([[10, 20], [10]], 10), ([[20], [10]], 0), ([[], [10]], 0)],
)
def test_a_pack_continues_from_the_newest_step_that_all_arms_have(steps, common):
    assert common_step(steps) == common
