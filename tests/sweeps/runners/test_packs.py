"""Sweeps as users run them: planned, packed, killed and continued, in a pool and as a search.

Each is a real process.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import submitit  # noqa: F401  here, where a warning of its own imports is no error

from cases.training import SMALL
from moejax.config import resolve
from moejax.sweeps import choice, product, seeds
from moejax.sweeps.arms import Plan, SweepError, plan_arms
from moejax.sweeps.packing import pack_arms
from moejax.sweeps.runners.packs import together
from moejax.sweeps.store.directory import add_arm, locked, open_sweep, write_sweep
from moejax.training.checkpoints.meta import saved_steps

ROOT = Path(__file__).parents[3]
SMALL_RUN = [
    "--config=configs/debug.py", "--config.train.num_steps=120", "--config.train.eval_every=60",
    "--config.train.checkpoint_every=20", "--config.train.log_every=10",
    "--config.model.num_layers=1", "--config.train.batch_size=4", "--config.data.seq_len=32",
]  # fmt: skip
AXES = ["moe.top_k=2,3", "moe.balance_weight=0.01,0.1"]
MEASURED = ("wall_s", "step_s", "median/perf/tokens_per_s", "command")
"""Columns that differ from one process to the next."""


def sweep(*arguments, **popen):
    """Starts a process of `moejax sweep`."""
    command = [sys.executable, "-m", "moejax", "sweep", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return output, errors


def rows_of(directory):
    rows = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache(tmp_path_factory):
    """The sweeps of this file share what they compile; it is not kept in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.data.directory={tmp_path_factory.mktemp('rows')}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """A sweep of two packs of two arms, and what it printed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, *finish(sweep(*SMALL_RUN, data, f"--dir={directory}", *AXES, "--json"))


def test_a_sweep_trains_each_arm_once_and_records_it(undisturbed):
    directory, output, errors = undisturbed
    ids = [entry["id"] for entry in json.loads((directory / "sweep.json").read_text())["arms"]]
    assert Counter(re.findall(r"arm (\w+): done", errors)) == dict.fromkeys(ids, 1)
    rows = rows_of(directory)
    assert [row["arm"] for row in rows] == ids
    assert {(row["override/moe.top_k"], row["override/moe.balance_weight"]) for row in rows} == {
        (2, 0.01), (2, 0.1), (3, 0.01), (3, 0.1),
    }  # fmt: skip
    for row in rows:
        assert (row["status"], row["fraction"], row["packed"]) == ("done", 1, 2)
        assert row["tail/loss/lm"] < 5 and row["steps"] == 120
    assert len({row["final/eval/loss"] for row in rows}) == 4
    settings = json.loads(output)["settings"]
    losses = [setting["validation loss"] for setting in settings]
    assert losses == sorted(losses) and len(losses) == 4
    assert "<html" in (directory / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_sweep_gives_the_records_of_an_undisturbed_one(undisturbed, data, tmp_path):
    directory, _, _ = undisturbed
    packs = json.loads((directory / "sweep.json").read_text())["packs"]
    arguments = [*SMALL_RUN, data, f"--dir={tmp_path}", *AXES, "--json"]
    first = sweep(*arguments, start_new_session=True)
    wait_for(lambda: (tmp_path / "arms" / packs[1][1] / "checkpoints/40").is_dir(), first)
    os.killpg(first.pid, signal.SIGKILL)
    _, before = first.communicate()
    last_record = tmp_path / "arms" / packs[1][0] / "record.json"
    assert not last_record.exists(), "killed too late to show anything"
    _, after = finish(sweep(*arguments))
    assert re.search(r"continuing 2 arms from step \d+", after)
    done = Counter(re.findall(r"arm (\w+): done", before + after))
    assert done == dict.fromkeys(itertools.chain.from_iterable(packs), 1)
    assert rows_of(tmp_path) == rows_of(directory)


@pytest.mark.slow
def test_a_pool_with_a_killed_process_gives_the_same_records(undisturbed, data, tmp_path):
    directory, _, _ = undisturbed
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a pool of two processes needs two cores")
    packs = json.loads((directory / "sweep.json").read_text())["packs"]
    pool = sweep(*SMALL_RUN, data, f"--dir={tmp_path}", *AXES, "--runner=pool", "--processes=2")
    wait_for(lambda: (tmp_path / "arms" / packs[0][0] / "checkpoints/20").is_dir(), pool)
    children = Path(f"/proc/{pool.pid}/task/{pool.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = finish(pool)
    assert "was ended by signal 9; starting it again" in errors
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    done = Counter(re.findall(r"arm (\w+): done", logs))
    assert done == dict.fromkeys(itertools.chain.from_iterable(packs), 1)
    found, expected = rows_of(tmp_path), rows_of(directory)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        # One core adds in another order than two, and where two experts are nearly equal the choice
        # may differ.
        assert row["final/eval/loss"] == pytest.approx(other["final/eval/loss"], rel=5e-3)
        for key in ("arm", "status", "tokens"):
            assert row[key] == other[key]


@pytest.mark.slow
def test_a_stopped_sweep_saves_and_goes_on_with_more_arms(undisturbed, data, tmp_path):
    arguments = [*SMALL_RUN, data, f"--dir={tmp_path}", "moe.top_k=2"]
    process = sweep(*arguments, "moe.balance_weight=0.01,0.1")
    wait_for(lambda: any(tmp_path.glob("arms/*/checkpoints/20")), process)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    assert "the same command continues" in errors
    assert not any(tmp_path.glob("arms/*/record.json"))
    stopped_at = {max(saved_steps(path)) for path in (tmp_path / "arms").iterdir()}
    assert len(stopped_at) == 1 and max(stopped_at) < 120
    # More values of an axis: a third arm, and the two continue.
    finish(sweep(*arguments, "moe.balance_weight=0.01,0.1,0.2"))
    rows = rows_of(tmp_path)
    assert len(rows) == 3
    expected = {row["arm"]: row["final/eval/loss"] for row in rows_of(undisturbed[0])}
    for row in rows:
        if row["arm"] in expected:
            assert row["final/eval/loss"] == pytest.approx(expected[row["arm"]], rel=1e-5)
    # With fewer arms it is another sweep.
    process = sweep(*arguments, "moe.balance_weight=0.01")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "holds a sweep with 2 arms that this one does not have" in errors


@pytest.mark.slow
def test_a_search_draws_trains_prunes_and_records(data, tmp_path):
    often = [flag.replace("eval_every=60", "eval_every=20") for flag in SMALL_RUN]
    arguments = [
        *often, data, f"--dir={tmp_path}", "moe.balance_weight=log:1e-3..1",
        "optimizer.learning_rate=log:1e-5..1e-2", "--search=random", "--trials=4",
        "--pruner=halving", "--json",
    ]  # fmt: skip
    output, errors = finish(sweep(*arguments))
    assert "moejax sweep worker --study=" in errors and "--host 127.0.0.1" in errors
    result = json.loads(output)
    assert result["trials told by this worker"] == 4
    rows = rows_of(tmp_path)
    assert len(rows) == 4 and {row["status"] for row in rows} == {"done", "pruned"}
    for row in rows:
        assert (row["fraction"] < 1) == (row["status"] == "pruned")
    best = min(row["final/eval/loss"] for row in rows if row["status"] == "done")
    assert result["best"]["value"] == best
    output, _ = finish(sweep(*join_search(tmp_path)))
    assert json.loads(output)["trials told by this worker"] == 0
    output, _ = finish(sweep("report", str(tmp_path), "--json"))
    assert json.loads(output)["compared"] == sum(row["status"] == "done" for row in rows)


def join_search(directory):
    """Returns the arguments of a worker that joins a search."""
    storage = f"--storage={directory}/study.journal"
    return ["worker", f"--study={directory.name}", storage, f"--dir={directory}", "--json"]


@pytest.mark.slow  # a worker counts as dead after a minute
def test_a_killed_search_is_finished_by_a_worker_from_its_checkpoint(data, tmp_path):
    arguments = [*SMALL_RUN, data, f"--dir={tmp_path}", "optimizer.learning_rate=log:1e-4..1e-2"]
    first = sweep(*arguments, "--search=random", "--trials=1", start_new_session=True)
    wait_for(lambda: any(tmp_path.glob("arms/*/checkpoints/40")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not any(tmp_path.glob("arms/*/record.json")), "killed too late to show anything"
    output, errors = finish(sweep(*join_search(tmp_path)))
    assert int(re.search(r"continuing \S+ from step (\d+)", errors)[1]) >= 20
    assert json.loads(output)["trials told by this worker"] == 1
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["steps"]) == ("done", 120)


def test_a_dry_run_lists_every_arm_with_its_cost_and_writes_nothing(tmp_path):
    directory = tmp_path / "sweep"
    dry_run = [
        "--config=configs/debug.py", "moe.num_experts=4,8", "moe.top_k=2,2", "--seeds=2",
        "--dry-run",
    ]  # fmt: skip
    output, errors = finish(sweep(*dry_run, f"--dir={directory}", "--match=total_params", "--json"))
    found = json.loads(output)
    assert (found["arms"], found["duplicates"]) == (6, 4)  # with a dense control for each seed
    assert len(found["list"]) == 6 and not directory.exists()
    controls = [arm for arm in found["list"] if arm["overrides"]["moe.num_experts"] == 0]
    assert len(controls) == 2 and all("model.d_ff" in arm["matched"] for arm in controls)
    by_experts = {arm["overrides"]["moe.num_experts"]: arm["matched"] for arm in found["list"]}
    assert by_experts[8] == {"moe.d_expert": 16}
    assert found["FLOPs"] == sum(arm["flops_total"] for arm in found["list"])
    assert "left out: moe.num_experts=4 moe.top_k=2 train.seed=0, which is arm" in errors
    table, _ = finish(sweep(*dry_run))
    assert all(word in table for word in ("moe.num_experts", "FLOPs/token", "duplicates"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe.num_expert=4"], "the nearest is moe.num_experts"),
        (["moe.num_experts=4,8", "moe.top_k=9"], "2 of 2 points cannot work, so none is run"),
        ([], "nothing varies"),
        (["bogus"], "neither an axis"),
        (["moe.top_k=2,3", "--pack=0"], "--pack=0 must be at least 1"),
        (["moe.balance_weight=log:1e-3..1"], "give the number of values"),
        (
            ["moe.balance_weight=log:1e-3..1", "--search=tpe", "--seeds=2"],
            "--seeds=2 goes with a sweep of given points",
        ),
        (["worker", "--study=x"], "--storage is missing"),
        (["report"], "name one sweep"),
        (["report", "/nowhere"], "sweep.json is missing"),
        (
            ["report", "runs/sweep", "--config=configs/debug.py"],
            "--config=configs/debug.py is not for moejax sweep rep",
        ),
        (["work", "--dir=/nowhere"], "sweep.json is missing"),
        (["moe.num_experts=4,8", "--match=active"], "--match"),
        (
            ["moe.top_k=2,3", "--runner=pool", "--processes=999", "--dir=DIR"],
            "--processes=999 must be at most",
        ),
        (
            ["moe.top_k=2,3", "--runner=pool", "--processes=0", "--dir=DIR"],
            "--processes=0 must be at least 1",
        ),
        (
            ["moe.top_k=2,3", "--runner=pool", "--gpus=-1", "--dir=DIR"],
            "--gpus=-1 must be at least 0",
        ),
        (
            ["moe.top_k=2,3", "--gpus=2", "--dir=DIR"],
            "--gpus=2 goes with --runner=pool or slurm, not here",
        ),
        (
            ["moe.top_k=2,3", "--runner=pool", "--partition=fast"],
            "--partition=fast goes with --runner=slurm, not pool",
        ),
        (["moe.top_k=2,3", "--adjust=steps"], "add --match"),
        (
            ["moe.top_k=2,3", "moe.top_k=4"],
            "moe.top_k is given twice; give it once: as an axis, by --seeds, or in the",
        ),
        (["train.seed=1,2", "--seeds=2"], "train.seed is given twice"),
        (
            ["moe.z_weight=lin:0..1:2.5"],
            "must have the form moe.z_weight=lin:1e-4..1e-1:5, from..to:number",
        ),
        (
            ["moe.num_experts=4,6", "--config.mesh.expert=4"],
            "moe.num_experts=6 must be a multiple of mesh.expert=4",
        ),
        (
            ["moe.top_k=2,3", "--config.mesh.data=64", "--config.train.batch_size=64", "--dir=DIR"],
            "do not fit",
        ),
        (["moe.top_k=2,3", "--runner=slurm", "--dir=DIR"], "sbatch"),
        (
            ["moe.top_k=2,3", "--runner=slurm", "--minutes=3", "--dir=DIR"],
            "--minutes=3 must be more than 4",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_trains(
    arguments, message, tmp_path, capsys, monkeypatch
):
    from moejax.cli import main

    # This process keeps its own compilation cache.
    monkeypatch.setattr("moejax.sweeps.runners.packs.keep_compilation_cache", lambda: None)
    arguments = [argument.replace("DIR", str(tmp_path / "sweep")) for argument in arguments]
    is_recipe_free = arguments[:1] in (["report"], ["work"], ["worker"])
    recipe = [] if is_recipe_free else ["--config=configs/debug.py"]
    assert main(["sweep", *recipe, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error, error
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "sweep() gives nothing; return a space"),
        ("return 3", "sweep() returns 3; return a space"),
        ("return; yield", "sweep() gives nothing; return a space"),
        (
            "yield ('moe.top_k', 4)",
            "sweep() yields ('moe.top_k', 4), which is no point; yield dicts",
        ),
        ("yield {}['no']", "KeyError: 'no', at `yield {}['no']`"),
        (
            "return where(choice('moe.top_k', 1), lambda point: 1 / 0)",
            "raised ZeroDivisionError: division by zero, for the point",
        ),
    ],
)
def test_a_mistake_in_the_space_of_a_recipe_names_the_recipe(body, message, tmp_path, capsys):
    from moejax.cli import main

    recipe = tmp_path / "recipe.py"
    space = f"\n\nfrom moejax.sweeps import choice, where\n\ndef sweep():\n    {body}\n"
    recipe.write_text((ROOT / "configs/debug.py").read_text() + space)
    assert main(["sweep", f"--config={recipe}", "--dry-run"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and str(recipe) in error, error


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the process got nowhere"
        time.sleep(0.02)


# Plans and directories
# ----------------------------------------------------------------------------------------------


def planned(*points) -> Plan:
    return plan_arms(SMALL, points)


def test_packs_hold_arms_of_one_program_in_even_parts():
    arms = planned(*product(choice("moe.num_experts", 4, 8), seeds(5))).arms
    packs = pack_arms(arms, 3)
    assert [len(pack) for pack in packs] == [2, 3, 2, 3]
    assert [*itertools.chain.from_iterable(packs)] == [arm.id for arm in arms]
    experts = {arm.id: arm.config.moe.num_experts for arm in arms}
    assert [{experts[arm_id] for arm_id in pack} for pack in packs] == [{4}, {4}, {8}, {8}]
    assert pack_arms(arms, 1) == tuple((arm.id,) for arm in arms)
    # Arms that need all devices.
    of_devices = planned(*product(choice("moe.balance_scope", "device"), seeds(3))).arms
    assert pack_arms(of_devices, 3) == tuple((arm.id,) for arm in of_devices)


def test_a_sweep_is_read_as_it_was_written_and_may_only_grow(tmp_path):
    points = [{"train.seed": seed} for seed in range(3)]
    facts = {"largest_pack": 2, "recipe": "r.py", "match": "", "command": "c"}
    written = write_sweep(tmp_path, planned(*points), **facts)
    assert open_sweep(tmp_path) == written
    grown = write_sweep(tmp_path, planned(*points, {"train.seed": 9}), **facts)
    assert set(written.arms) < set(grown.arms)
    with pytest.raises(SweepError, match="holds a sweep with 3 arms that this one does not have"):
        write_sweep(tmp_path, planned(points[0]), **facts)
    definition = tmp_path / "sweep.json"
    definition.write_text(definition.read_text().replace('"packs"', '"other"'))
    with pytest.raises(SweepError, match="packs must hold each arm once"):
        open_sweep(tmp_path)


def test_a_search_adds_each_arm_once(tmp_path):
    arms = planned({"train.seed": 0}, {"train.seed": 1}).arms
    for arm in (arms[0], arms[1], arms[0]):
        add_arm(tmp_path / "search", arm, recipe="r.py", command="c")
    assert list(open_sweep(tmp_path / "search").arms) == [arm.id for arm in arms]
    assert open_sweep(tmp_path / "search").packs == tuple((arm.id,) for arm in arms)


def test_a_pack_belongs_to_one_process_at_a_time(tmp_path):
    sweep = write_sweep(tmp_path, planned({}), largest_pack=1, recipe="r.py", match="", command="c")
    with sweep.claim(sweep.packs[0]) as first, sweep.claim(sweep.packs[0]) as second:
        assert (first, second) == (True, False)
    with sweep.claim(sweep.packs[0]) as again:
        assert again


def test_an_arm_belongs_to_one_process_even_if_packs_are_planned_again(tmp_path):
    points = [{"train.seed": seed} for seed in range(4)]
    facts = {"recipe": "r.py", "match": "", "command": "c"}
    before = write_sweep(tmp_path, planned(*points[2:]), largest_pack=2, **facts)
    after = write_sweep(tmp_path, planned(*points), largest_pack=3, **facts)
    shared, apart = after.packs[1], after.packs[0]
    assert set(shared) == set(before.packs[0]) and not set(apart) & set(shared)
    claim = before.claim(before.packs[0])
    with claim as held, after.claim(shared) as same, after.claim(apart) as other:
        assert (held, same, other) == (True, False, True)
        with after.claim((*apart, *shared)) as part, after.claim(before.packs[0][:1]) as one:
            assert not part and not one
    with after.claim(shared) as first, before.claim(before.packs[0][1:]) as second:
        assert first and not second
    # A process that does not get all of its arms keeps none.
    with before.claim(before.packs[0][:1]), after.claim((*shared, *apart)) as has_all:
        assert not has_all
    with after.claim(after.packs[1]) as again:
        assert again


def test_a_sweep_is_written_by_one_process_at_a_time(tmp_path):
    facts = {"largest_pack": 1, "recipe": "r.py", "match": "", "command": "c"}
    with locked(tmp_path, "definition"):
        thread = threading.Thread(target=write_sweep, args=(tmp_path, planned({})), kwargs=facts)
        thread.start()
        thread.join(0.3)
        assert not (tmp_path / "sweep.json").exists()
    thread.join()
    assert (tmp_path / "sweep.json").exists()


def test_a_search_and_a_sweep_of_given_points_share_no_directory(tmp_path):
    from moejax.cli import main

    one, other = planned({"train.seed": 0}), planned({"train.seed": 1})
    facts = {"largest_pack": 1, "recipe": "r.py", "match": "", "command": "c"}
    write_sweep(tmp_path / "grid", one, **facts)
    message = "grid holds a sweep of given points; give the search another --dir"
    with pytest.raises(SweepError, match=message):
        add_arm(tmp_path / "grid", other.arms[0], recipe="r.py", command="c")
    flags = ["--search=random", "--trials=1", "moe.top_k=2,3", f"--dir={tmp_path / 'grid'}"]
    assert main(["sweep", "--config=configs/debug.py", *flags]) == 2
    assert not (tmp_path / "grid/study.journal").exists()
    add_arm(tmp_path / "search", one.arms[0], recipe="r.py", command="c")
    add_arm(tmp_path / "search", other.arms[0], recipe="r.py", command="c")
    message = "search holds the arms of a search; give these points another --dir"
    with pytest.raises(SweepError, match=message):
        write_sweep(tmp_path / "search", planned({"train.seed": 0}, {"train.seed": 1}), **facts)


@pytest.mark.parametrize(
    ("saved", "groups"),
    [
        ([[], [], []], [[0, 1, 2]]),
        ([[2], [2], [2]], [[0, 1, 2]]),
        ([[1, 2], [1], [1, 2]], [[0, 1, 2]]),
        ([[2], [1], [2]], [[0, 2], [1]]),
        ([[1, 2], [1, 3], [1, 2]], [[0, 2], [1]]),  # at 1 all would lose a save
        ([[2], [], [2]], [[0, 2], [1]]),
        ([[2, 4], [2], [2]], [[0], [1, 2]]),  # trained to its end: not again
        ([[4], [4], [4]], [[0], [1], [2]]),
    ],
)
def test_arms_continue_together_from_a_common_checkpoint(saved, groups, tmp_path):
    plan = planned(*({"train.seed": seed} for seed in range(3)))
    sweep = write_sweep(tmp_path, plan, largest_pack=3, recipe="r.py", match="", command="c")
    assert plan.arms[0].config.train.num_steps == 4
    for arm, steps in zip(plan.arms, saved, strict=True):
        for step in steps:
            (sweep.workdir(arm.id) / "checkpoints" / str(step)).mkdir(parents=True)
    together_by_index = []
    for group in together(sweep, plan.arms):
        together_by_index.append([plan.arms.index(arm) for arm in group])
    assert together_by_index == groups


def test_the_configuration_in_an_entry_resolves_to_that_of_its_arm():
    arm = planned({"moe.balance_weight": 0.3}).arms[0]
    assert resolve(arm.to_json()["config"]) == arm.config
