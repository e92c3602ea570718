"""Arms of a sweep in one program: each gives what it gives alone, is saved alone, and continues exactly."""

import contextlib
import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moejax.config import ConfigError, Knobs
from moejax.inspection.run import open_run
from moejax.training.alarms import AlarmError, read_alarms
from moejax.training.checkpoint import Checkpoints
from moejax.training.loop import train
from moejax.training.metrics import MetricsFile
from moejax.training.nonfinite import NonFiniteError
from moejax.training.packed import Pack, program_of
from moejax.training.packed_loop import common_step, train_packed
from moejax.training.routing_log import read_routing
from moejax.training.signals import StopSignals
from moejax.training.step import make_train_step, put_batch
from training_cases import case_config, make, packed_batch, replace, small_config

TRAIN = {"num_steps": 50, "log_every": 5, "eval_every": 25, "checkpoint_every": 10, "keep_checkpoints": 9}
ARMS = [
    {"train": {"seed": 0}, "moe": {"balance_weight": 0.1}},
    {"train": {"seed": 1}, "moe": {"balance_weight": 0.02, "z_weight": 0.1}},
    {"train": {"seed": 0}, "moe": {"bias_rate": 0.05}, "optimizer": {"learning_rate": 1e-3}},
]
MOE = {"selection_bias": True, "bias_rate": 1e-3, "jitter": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_once(tmp_path_factory):
    """Arms alone, and a pack that continues, have programs in common that jax would compile again for each call."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, option) for option in options]
    for option, value in zip(options, (str(tmp_path_factory.mktemp("programs")), 0), strict=True):
        jax.config.update(option, value)
    yield
    for option, value in zip(options, before, strict=True):
        jax.config.update(option, value)
    compilation_cache.reset_cache()


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
            assert math.isclose(one[key], value, rel_tol=rtol, abs_tol=rtol), (other["step"], key, one[key], value)


def assert_states_are_close(found, expected, rtol=1e-5):
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, wanted), value in leaves:
        wanted, value = np.asarray(wanted, np.float64), np.asarray(value, np.float64)
        scale = max(np.abs(wanted).max(), 1e-8)
        assert np.abs(value - wanted).max() <= rtol * scale, jax.tree_util.keystr(path)


def newest_state(config, workdir):
    trainable = make(config)
    with Checkpoints(workdir, trainable, read_only=True) as checkpoints, jax.set_mesh(trainable.mesh):
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
    assert_states_are_close(newest_state(alone, workdirs[arm]), newest_state(alone, tmp_path / "alone"), rtol=1e-4)
    found, wanted = read_routing(workdirs[arm]), read_routing(tmp_path / "alone")
    np.testing.assert_array_equal(found.steps, wanted.steps)
    np.testing.assert_allclose(found.read("bias"), wanted.read("bias"), rtol=1e-5, atol=1e-6)
    for name in ("config.json", "checkpoints", "tokenizer.json", "routing/evaluations/50.npz", "alarms.jsonl"):
        assert (workdirs[arm] / name).exists() == (tmp_path / "alone" / name).exists(), name


def test_arms_of_a_pack_differ_and_a_run_directory_opens_like_any_other(packed):
    _, workdirs, results = packed
    losses = [result.evaluation.loss for result in results]
    assert len(set(losses)) == 3
    assert open_run(workdirs[0]).config["train"]["num_steps"] == 50


def test_a_pack_that_was_stopped_continues_exactly_as_if_it_had_not_been(packed, tmp_path):
    configs, workdirs, _ = packed
    again = [tmp_path / f"arm{i}" for i in range(3)]
    stop = StopSignals()
    stopping = _stop_at(again[1], 15, stop)
    with stopping:
        results = train_packed(configs, again, stop=stop, devices=jax.devices()[:2])
    assert {result.stopped_by for result in results} == {"TEST"}
    assert len({result.step for result in results}) == 1 and results[0].step < 50
    # One arm's newest checkpoint is lost, as if the process had been killed between two saves.
    steps = sorted(int(path.name) for path in (again[1] / "checkpoints").iterdir() if path.name.isdigit())
    shutil.rmtree(again[1] / "checkpoints" / str(steps[-1]))
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
    results = train_packed(longer, [tmp_path / "arm0", tmp_path / "arm1"], devices=jax.devices()[:1])
    assert [result.step for result in results] == [60, 60]
    assert lines_of(tmp_path / "arm1")[-1]["step"] == 60


def _stop_at(workdir, step, stop):
    """Asks for a stop once the metrics of that step are written."""

    @contextlib.contextmanager
    def patched():
        original = MetricsFile.write

        def write(self, at, values):
            original(self, at, values)
            if self.path.parent == workdir and at >= step:
                stop.request("TEST")

        MetricsFile.write = write
        try:
            yield
        finally:
            MetricsFile.write = original

    return patched()


def test_arms_that_cannot_go_on_end_and_the_others_do_not_notice(tmp_path):
    leaves = {"num_steps": 12, "log_every": 2, "eval_every": 6, "checkpoint_every": 6, "max_nonfinite_steps": 2}
    configs = arm_configs(tmp_path, **leaves)
    configs[0] = replace(configs[0], "alarms", logits=1e-6, stop="logits")
    configs[1] = replace(replace(configs[1], "optimizer", learning_rate=1e30), "moe", balance_weight=1e30)
    workdirs, ended = [tmp_path / f"arm{i}" for i in range(3)], []

    def on_end(index, result):
        """What an arm leaves behind is there at once, and the others have not ended."""
        saved = (workdirs[index] / "checkpoints/6").is_dir()
        ended.append((index, result, lines_of(workdirs[index])[-1]["step"], saved))
        assert not (workdirs[2] / "checkpoints/12").exists()

    alarmed, broken, sound = train_packed(configs, workdirs, devices=jax.devices()[:1], on_end=on_end)
    assert ended == [(1, broken, broken.step, False), (0, alarmed, 6, True)]
    assert isinstance(broken.error, NonFiniteError) and "2 steps in a row" in str(broken.error)
    assert broken.evaluation is None and broken.step < 6
    assert not (tmp_path / "arm1/checkpoints/6").exists()
    assert isinstance(alarmed.error, AlarmError) and alarmed.evaluation is None
    assert alarmed.step == 6 and (tmp_path / "arm0/checkpoints/6").is_dir()
    assert not (tmp_path / "arm0/checkpoints/12").exists()
    assert (sound.error, sound.step) == (None, 12)
    assert lines_of(tmp_path / "arm2")[-1]["step"] == 12
    intervals = [json.loads(line) for line in (workdirs[2] / "metrics.jsonl").read_text().splitlines()]
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
    states, outputs = pack.split(state), pack.outputs(output)
    for arm, config in enumerate(configs):
        trainable = make(config)
        with jax.set_mesh(trainable.mesh):
            alone, alone_step = jax.device_put(first[arm], trainable.shardings), make_train_step(trainable)
            for _ in range(2):
                alone, expected = alone_step(alone, put_batch(batches[arm], trainable), Knobs.of(config))
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
    configs = [small_config(mesh=mesh, model={"remat": False}, train={"seed": seed}) for seed in (0, 1)]
    pack = Pack(configs)
    assert dict(pack.mesh.shape) | {"arms": 2, "data": 2, "expert": 2} == dict(pack.mesh.shape)
    batches = [packed_batch(config, seed=i) for i, config in enumerate(configs)]
    with jax.set_mesh(pack.mesh):
        state = pack.join([trainable.init(c.train.seed) for trainable, c in zip(pack.trainables, configs, strict=True)])
        _, output = pack.compile_step(state, pack.put_batches(batches))(state, pack.put_batches(batches), pack.knobs)
    trainable = make(replace(configs[0], "mesh", data=1, expert=1))
    one_device_step = make_train_step(trainable)  # the seed is a knob
    for arm, config in enumerate(configs):
        with jax.set_mesh(trainable.mesh):
            arguments = trainable.init(config.train.seed), put_batch(batches[arm], trainable), Knobs.of(config)
            _, expected = one_device_step(*arguments)
        for name, value in jax.device_get(expected.scalars).items():
            assert pack.outputs(output)[arm].scalars[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("one", "other", "is_one_program"),
    [
        ({"train": {"seed": 1}}, {"train": {"seed": 2}}, True),
        ({"moe": {"balance_weight": 0.1}}, {"moe": {"balance_weight": 0.2}}, True),
        ({"moe": {"balance_weight": 0.1}}, {"moe": {"balance_weight": 0.0}}, False),
        ({"moe": {"num_experts": 4}}, {"moe": {"num_experts": 8}}, False),
        ({"moe": {"capacity_factor": 1.0}}, {"moe": {"capacity_factor": 2.0}}, False),  # dropless: not used, but told
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
        with pytest.raises(ConfigError, match="arms of a pack may differ in knobs"):
            Pack(configs, jax.devices()[:1])


@pytest.mark.parametrize(
    ("steps", "common"), [([[10, 20], [20, 10]], 20), ([[10, 20], [10]], 10), ([[20], [10]], 0), ([[], [10]], 0)]
)
def test_a_pack_continues_from_the_newest_step_that_all_arms_have(steps, common):
    assert common_step(steps) == common
