"""Runs that begin with the weights of others, trained for a few steps."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cases.training import small_config
from moejax.config import ConfigError, resolve, to_dict
from moejax.inference.load import load_run
from moejax.sharding import make_mesh
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.checkpoints.meta import named_arrays, tokenizer_digests
from moejax.training.forking.fork import fork_state
from moejax.training.loop import train
from moejax.training.packed.train import train_packed
from moejax.training.state import make_train_setup

MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16, "selection_bias": True}
OPTIMIZER = {"schedule": "wsd", "warmup_fraction": 0.0, "decay_fraction": 0.5}


def config_of(num_steps=8, **sections):
    """A run that saves every 4 steps; sections as in `small_config`."""
    train_leaves = {
        "batch_size": 8, "num_steps": num_steps, "checkpoint_every": 4, "eval_every": 0,
        "log_every": 2, "keep_checkpoints": 9,
    }  # fmt: skip
    own = {"moe": MOE, "optimizer": OPTIMIZER} | sections
    return small_config(train=train_leaves | own.pop("train", {}), **own)


CONSTANT = OPTIMIZER | {"decay_fraction": 0.0}


def trunk_config():
    return config_of(optimizer=CONSTANT)


def with_init(config, source, **init):
    return dataclasses.replace(
        config, init=dataclasses.replace(config.init, source=str(source), **init)
    )


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run of 8 steps at a constant rate, with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("forks") / "trunk"
    train(trunk_config(), workdir, command="moejax train trunk")
    return workdir


def arrays_of(workdir, config, step):
    """Returns all arrays of a checkpoint by path."""
    setup = make_train_setup(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(workdir, setup, read_only=True) as checkpoints:
        state = checkpoints.restore(step)
    return {name: np.asarray(array) for name, array in named_arrays(state).items()}


def first_state(config, num_devices=1):
    """Returns the arrays of a fork before its first step."""
    devices = jax.devices()[:num_devices]
    setup = make_train_setup(config, make_mesh(config, devices))
    state = fork_state(setup, 3, Path("no run yet"))
    return {name: np.asarray(array) for name, array in named_arrays(state).items()}


def model_arrays(arrays):
    """The arrays that make a model's function."""
    return {
        name: array
        for name, array in arrays.items()
        if name.startswith(("params/", "router_state/")) and "idle_steps" not in name
    }


@pytest.mark.parametrize(("num_devices", "mesh"), [(1, {}), (8, {"data": 2, "expert": 4})])
def test_a_fork_has_the_weights_and_biases_and_a_fresh_optimizer(trunk, num_devices, mesh):
    config = with_init(config_of(mesh={"data": -1} | mesh), f"{trunk}:4")
    state = first_state(config, num_devices)
    source = arrays_of(trunk, trunk_config(), 4)
    for name, array in model_arrays(source).items():
        assert np.array_equal(state[name], array), name
    biases = [name for name in state if name.endswith("selection_bias")]
    assert biases and all(state[name].any() for name in biases)
    for name, array in state.items():
        if name.startswith("opt_state/") or "idle_steps" in name:
            assert not array.any(), name
    assert state["step"] == 0


def test_a_decay_off_a_trunk_is_a_run_that_was_one_from_the_start(trunk, tmp_path):
    """The trunk's rate is constant, so the run of 8 steps has it for its first four."""
    train(config_of(), tmp_path / "whole", command="")
    decay = with_init(config_of(), f"{trunk}:4", state="all")
    result = train(decay, tmp_path / "decay", command="")
    assert result.step == 8
    whole = arrays_of(tmp_path / "whole", config_of(), 8)
    forked = arrays_of(tmp_path / "decay", decay, 8)
    for name, array in whole.items():
        assert np.array_equal(array, forked[name]), name
    lines = [json.loads(line) for line in (tmp_path / "decay/metrics.jsonl").open()]
    expected = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "tokens" in line] == [6, 8]
    for key in ("loss/lm", "tokens", "learning_rate"):
        assert [line[key] for line in lines if "tokens" in line] == [
            line[key] for line in expected if "tokens" in line and line["step"] > 4
        ]


def test_the_optimizer_may_be_kept_without_the_step(trunk):
    state = first_state(with_init(config_of(), f"{trunk}:4", state="optimizer"))
    source = arrays_of(trunk, trunk_config(), 4)
    for name, array in source.items():
        assert np.array_equal(state[name], array) or name == "step", name
    assert state["step"] == 0


def test_a_fork_goes_on_from_its_own_checkpoints_when_the_source_is_gone(trunk, tmp_path):
    source = shutil.copytree(trunk, tmp_path / "source")
    config = with_init(config_of(num_steps=4), source)
    train(config, tmp_path / "fork", command="")
    shutil.rmtree(source)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=6))
    assert train(longer, tmp_path / "fork", command="").step == 6
    facts = json.loads((tmp_path / "fork/config.json").read_text())
    assert [entry["step"] for entry in facts["lineage"]] == [8]
    assert load_run(tmp_path / "fork").step == 6


def test_the_lineage_names_all_runs_back_to_the_first(trunk, tmp_path):
    train(with_init(config_of(num_steps=4), f"{trunk}:4"), tmp_path / "a", command="first")
    train(with_init(config_of(num_steps=4), tmp_path / "a"), tmp_path / "b", command="second")
    lineage = json.loads((tmp_path / "b/config.json").read_text())["lineage"]
    found = [(entry["workdir"], entry["step"], entry["command"]) for entry in lineage]
    assert found == [(str(tmp_path / "a"), 4, "first"), (str(trunk), 4, "moejax train trunk")]
    assert len({entry["arrays_sha256"] for entry in lineage}) == 2


def test_a_fork_that_began_keeps_its_step_when_the_source_is_trained_on(trunk, tmp_path):
    source = shutil.copytree(trunk, tmp_path / "source")
    shutil.rmtree(source / "checkpoints/8")
    config = with_init(config_of(num_steps=4), source)
    train(config, tmp_path / "fork", command="")
    expected = arrays_of(tmp_path / "fork", config, 4)
    shutil.rmtree(source)
    shutil.copytree(trunk, source)  # now with step 8
    shutil.rmtree(tmp_path / "fork/checkpoints")
    train(config, tmp_path / "fork", command="")
    again = arrays_of(tmp_path / "fork", config, 4)
    assert all(np.array_equal(expected[name], again[name]) for name in expected)


def test_experts_are_copied_and_the_rest_is_as_it_was(trunk):
    config = with_init(config_of(moe=MOE | {"num_experts": 8}), f"{trunk}:4", resize="copy")
    state = model_arrays(first_state(config))
    for name, array in model_arrays(arrays_of(trunk, trunk_config(), 4)).items():
        axis = {"router": -1, "selection_bias": -1, "experts": 1}
        axes = [axis[part] for part in name.split("/") if part in axis]
        if not axes:
            assert np.array_equal(state[name], array), name
            continue
        first, second = np.split(state[name], 2, axis=axes[0])
        assert np.array_equal(first, array) and np.array_equal(second, array), name


def test_a_router_of_another_kind_begins_fresh_and_experts_do_not(trunk):
    moe = MOE | {"router": "cosine", "d_router": 8, "selection_bias": False}
    config = with_init(config_of(moe=moe), f"{trunk}:4", exclude="router, *selection_bias")
    state = first_state(config)
    source = arrays_of(trunk, trunk_config(), 4)
    for name, array in model_arrays(source).items():
        if "router/" not in name and "selection_bias" not in name:
            assert np.array_equal(state[name], array), name
    assert any("router/" in name for name in state)


def test_a_fork_has_the_tokenizer_of_its_source_unless_it_asks_for_another(tmp_path):
    bpe = {"tokenizer": "bpe", "vocab_size": 512, "source": "files", "seq_len": 16}
    random = np.random.default_rng(0)
    files = {}
    for name, letters in (("source", "abcdefghij"), ("fork", "klmnopqrst")):
        words = ["".join(random.choice(list(letters), 6)) for _ in range(400)]
        lines = [" ".join(random.choice(words, 12)) for _ in range(300)]
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n\n".join(lines))
    source = config_of(num_steps=2, data=bpe | {"files": str(files["source"])})
    train(source, tmp_path / "a", command="")
    other = config_of(num_steps=2, data=bpe | {"files": str(files["fork"])})
    train(with_init(other, tmp_path / "a"), tmp_path / "b", command="")
    train(other, tmp_path / "c", command="")
    one, two, own = (tokenizer_digests(tmp_path / name) for name in "abc")
    assert one == two != own
    bytes_of = config_of(num_steps=2, data={"tokenizer": "bytes", "seq_len": 16})
    train(with_init(bytes_of, tmp_path / "a", exclude="embedding"), tmp_path / "d", command="")
    assert load_run(tmp_path / "d").tokenizer.vocab_size < 300


def test_forks_train_in_a_pack_as_they_do_alone(trunk, tmp_path):
    configs = []
    for rate in (1e-3, 1e-2):
        optimizer = OPTIMIZER | {"learning_rate": rate}
        configs.append(with_init(config_of(num_steps=4, optimizer=optimizer), f"{trunk}:4"))
    train(configs[1], tmp_path / "alone", command="")
    train_packed(configs, [tmp_path / "0", tmp_path / "1"], command="")
    alone = arrays_of(tmp_path / "alone", configs[1], 4)
    for name, array in arrays_of(tmp_path / "1", configs[1], 4).items():
        # Adam divides by the root of small numbers, in which the order of additions shows.
        np.testing.assert_allclose(array, alone[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("init", "sections", "message"),
    [
        ({"source": "none"}, {}, "none/config.json does not exist"),
        ({"source": "TRUNK:5"}, {}, r"holds no step 5; it holds \[4, 8\]"),
        ({"source": "TRUNK", "state": "all"}, {}, "num_steps=8 must be above 8, the step at which"),
        (
            {"source": "TRUNK:4", "state": "optimizer"},
            {"optimizer": {"name": "lion"}},
            "whose moments differ from those here",
        ),
        (
            {"source": "TRUNK:4", "state": "optimizer"},
            {"moe": MOE | {"num_experts": 8}},
            "whose weights differ from those here",
        ),
        ({"source": "TRUNK:4"}, {"moe": MOE | {"num_experts": 8}}, "init.resize=copy takes more"),
        (
            {"source": "TRUNK:4", "resize": "copy"},
            {"moe": MOE | {"num_experts": 8, "num_zero_experts": 1}},
            "moe.num_experts=8 are not its only ones",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(trunk, init, sections, message):
    init = init | {"source": init["source"].replace("TRUNK", str(trunk))}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        first_state(with_init(config_of(**sections), **init))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"include": "rooter"}, "init.include: 'rooter' is no kind of parameters"),
        ({"rename": "a"}, "init.rename: 'a' must have the form SOURCE=HERE"),
        ({"rename": "a=b, a=c"}, "init.rename names a twice"),
        ({"state": "all", "exclude": "router"}, "init.exclude=router takes a part of the weights"),
        ({"upcycle": "copy", "exclude": "router"}, "exclude=router does nothing with init.upcycle"),
        ({"source": "", "resize": "copy"}, "init.resize=copy .*init.source"),
    ],
)
def test_leaves_that_cannot_be_meant_are_refused(init, message):
    content = to_dict(small_config()) | {"init": {"source": "runs/a"} | init}
    with pytest.raises(ConfigError, match=message):
        resolve(content, typed=[f"init.{name}" for name in init])
