"""Several processes train what one trains, bit for bit, even if some of them are stopped or killed.

The bits are the same because every sum here goes over two devices: over four, gloo adds in another
order than one process.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cases.tfds import write_dataset
from cases.training import make, small_config
from moejax.cli import main
from moejax.config import to_dict
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.multihost import processes
from moejax.training.run_directory.routing_log import read_routing

REPOSITORY = Path(__file__).parents[3]
LAUNCHER = REPOSITORY / "experiments/launch/slurm.py"
SECONDS = 240  # until a process that should have ended is killed; far more than it takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe for four devices, its text, and the compilation cache that most runs share."""
    folder = tmp_path_factory.mktemp("processes")
    write_text(folder / "sets")
    values = to_dict(recipe_config(folder))
    (folder / "recipe.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(arg=''):\n    return ConfigDict({values!r})\n"
    )
    return folder


def write_text(folder):
    """A dataset of two domains, one in lower case."""
    texts = []
    for seed in range(10):
        letters = np.random.default_rng(seed).choice([*"abcdefghij    "], 800)
        texts.append("".join(letters))
    lower = [{"text": text, "domain": "lower"} for text in texts[::2]]
    upper = [{"text": text.upper(), "domain": "upper"} for text in texts[1::2]]
    splits = {"train": lower[1:] + upper[1:], "validation": [lower[0], upper[0]]}
    write_dataset(folder, splits)


def recipe_config(folder):
    return small_config(
        model={"num_layers": 1, "d_model": 16, "remat": False},
        attention={"num_heads": 2, "num_kv_heads": 2},
        data={
            "source": "tfds",
            "name": "letters",
            "source_dir": str(folder / "sets"),
            "directory": str(folder / "data"),
        },
        train={
            "num_steps": 32,
            "batch_size": 8,
            "log_every": 1,
            "eval_every": 16,
            "checkpoint_every": 8,
            "step_limit_s": 100.0,
        },
        # Of 4 x 1 devices two and two need the same rows.
        mesh={"data": 1, "expert": 2, "tensor": 2},
    )


def environment(folder, num_devices):
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(folder, num_processes, num_devices, arguments):
    """Processes of `python arguments(index, flags)`; those still there at the end are killed."""
    port, processes = free_port(), []
    try:
        for index in range(num_processes):
            flags = [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={num_processes}",
                f"--process_id={index}",
            ]
            command = [sys.executable, *arguments(index, flags if num_processes > 1 else [])]
            process = subprocess.Popen(
                command,
                env=environment(folder, num_devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def training(folder, workdir, *more):
    command = [
        "-m",
        "moejax",
        "train",
        f"--config={folder / 'recipe.py'}",
        f"--workdir={workdir}",
        "--json",
        *more,
    ]
    return lambda index, flags: [*command, *flags]


def ends(processes):
    """Exit codes, outputs and errors."""
    texts = [process.communicate(timeout=SECONDS) for process in processes]
    return (
        [process.returncode for process in processes],
        [out for out, _ in texts],
        [errors for _, errors in texts],
    )


def own_lines(text):
    """The lines without gloo's greetings."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_doctor_finds_that_tokens_meet_their_experts_across_processes(folder):
    def doctor(index, flags):
        return [
            "-m",
            "moejax",
            "doctor",
            f"--config={folder / 'recipe.py'}",
            "--mesh=dcn_expert=2,expert=2",
            "--json",
            "--config.moe.exchange=two_level",
            *flags,
        ]

    with started(folder, 2, 2, doctor) as processes:
        codes, outputs, errors = ends(processes)
    assert codes == [0, 0], errors
    rows = json.loads(outputs[0])
    assert rows["exchange"] == "two_level" and rows["check: exchange"].startswith("ok, within")
    assert {"dcn_expert", "expert"} <= {row["axis"] for row in rows["collectives"]}
    assert outputs[1] == "", "process 0 speaks for all"


def wait_for(condition, processes):
    deadline = time.monotonic() + SECONDS
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def curve(workdir):
    """Every line of the metrics without the speed."""
    text = (workdir / "metrics.jsonl").read_text()
    return [without_times(json.loads(line)) for line in text.splitlines()]


def without_times(line):
    return {key: value for key, value in line.items() if not key.startswith("perf/")}


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process on four devices."""
    with started(folder, 1, 4, training(folder, folder / "alone", "--noreport")) as processes:
        codes, _, errors = ends(processes)
    assert codes == [0], errors
    return folder / "alone"


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of two processes with two devices each; one got SIGTERM before its first step."""
    workdir = folder / "run"
    with started(folder, 2, 2, training(folder, workdir)) as processes:
        wait_for((workdir / "routing/zarr.json").exists, processes)
        processes[1].send_signal(signal.SIGTERM)
        return workdir, *ends(processes)


def copy_of(workdir, folder):
    """Copies a run whose processes have ended."""
    return shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns(".lock"))


@pytest.fixture(scope="module")
def killed(folder, stopped):
    """The same run continued by four processes, of which the last was killed.

    The last value is how many seconds the others lived after that.
    """
    workdir = copy_of(stopped[0], folder / "killed")
    with started(folder, 4, 1, training(folder, workdir)) as processes:
        wait_for((workdir / "checkpoints/8").exists, processes)
        processes[3].kill()
        since = time.monotonic()
        codes, _, errors = ends(processes)
        return workdir, codes, errors, time.monotonic() - since


@pytest.fixture(
    scope="module",
    params=[
        "straight",
        pytest.param("stopped", marks=pytest.mark.slow),
        pytest.param("killed", marks=pytest.mark.slow),
    ],
)
def finished(folder, request):
    """The same run by two processes, which the launcher started: without a stop, or after one."""
    workdir = folder / f"finished-{request.param}"
    if request.param != "straight":
        copy_of(request.getfixturevalue(request.param)[0], workdir)
    jobs = folder / f"slurm-{request.param}"
    options = [
        "--cluster=local",
        "--local_processes=2",
        "--minutes=5",
        f"--folder={jobs}",
    ]
    flags = training(folder, workdir)(0, [])[3:]
    command = [sys.executable, str(LAUNCHER), *options, "--", *flags]
    done = subprocess.run(
        command, env=environment(folder, 2), capture_output=True, text=True, timeout=SECONDS
    )
    logs = "".join(path.read_text() for path in sorted(jobs.glob("*/*_log.*")))
    assert done.returncode == 0, done.stderr + logs
    return workdir, done.stdout, logs


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_saved_step(stopped):
    workdir, codes, _, errors = stopped
    assert codes == [0, 0], errors
    assert f"SIGTERM: saved step 2 in {workdir}" in errors[0]
    assert (workdir / "checkpoints/2").exists()
    assert json.loads((workdir / "config.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_only_process_0_logs_what_is_the_same_in_all_processes(stopped):
    _, _, outputs, errors = stopped
    assert outputs == ["", ""]
    assert errors[0].count("compiled the train step") == 1
    assert "compiled the train step" not in errors[1] and "rows" not in errors[1]


def was_aborted_at_once(codes, errors, index):
    """Whether gloo aborted a process before it could report that another one has ended.

    Gloo throws where nothing catches it if a process dies within a collective and the next one
    begins elsewhere: "received data size doesn't match". What jax ends has had the time to report.
    """
    is_thrown = "gloo::EnforceNotMet" in errors[index]
    has_reported = "moejax: process" in errors[index]
    return codes[index] == -signal.SIGABRT and is_thrown and not has_reported


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_fail_within_a_minute(killed):
    _, codes, errors, seconds = killed
    assert codes[3] == -signal.SIGKILL
    assert all(code != 0 for code in codes), errors
    named = r"3 on \S+"
    witnesses = {index for index in (0, 1, 2) if not was_aborted_at_once(codes, errors, index)}
    if 0 not in witnesses:
        named = r"(?:0|3 on \S+)"  # process 0, which tells the others, could not tell them
    assert witnesses, errors
    for index in witnesses:
        # Not always a line of its own: what ends the process may write at the same time.
        pattern = rf"moejax: process {named} has ended or .* from the newest checkpoint"
        reports = re.findall(pattern, errors[index])
        assert len(reports) == 1, errors[index]
        assert "Traceback" not in errors[index][: errors[index].index(reports[0])], errors[index]
    assert seconds < 60
    print(f"the others ended after {seconds:.1f} s with {codes[:3]}")


def test_the_loss_curve_is_that_of_one_process_bit_for_bit(alone, finished):
    assert curve(finished[0]) == curve(alone)
    assert len(curve(alone)) == 34  # 32 steps and two evaluations
    evaluated = [line for line in curve(alone) if "eval/loss" in line]
    assert len(evaluated) == 2
    assert all({"eval/loss/lower", "eval/loss/upper"} <= line.keys() for line in evaluated)
    counts_SNE = read_routing(finished[0]).counts_SNE
    np.testing.assert_array_equal(counts_SNE, read_routing(alone).counts_SNE)
    files = os.listdir(finished[0] / "routing/evaluations")
    assert sorted(files) == sorted(os.listdir(alone / "routing/evaluations"))


def test_the_state_is_that_of_one_process_bit_for_bit(folder, alone, finished):
    setup = make(recipe_config(folder), 4)
    states = [
        Checkpoints(workdir, setup, read_only=True).restore(32) for workdir in (finished[0], alone)
    ]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_launcher_names_the_logs_and_process_0_prints_one_document(finished):
    workdir, printed, logs = finished
    assert re.search(r"job \d+: logs .*_log.out, .*_log.err", printed)
    assert json.loads(logs[logs.index("{\n") : logs.index("\n}") + 2])["steps"] == 32
    assert logs.count('"steps"') == 1
    assert f"moejax report --workdir={workdir} writes it" in logs
    assert "Gloo" not in logs[logs.index("{\n") : logs.index("\n}")]


def test_the_launcher_asks_slurm_for_a_process_per_gpu_and_for_jobs_in_turn(tmp_path):
    programs = {
        "srun": "exit 0",
        "sbatch": f'cp "$1" {tmp_path}/submitted; echo Submitted batch job 42',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    options = ["--nodes=2", "--gpus_per_node=8", "--minutes=60", "--jobs=2", "--partition=gpu"]
    options += [f"--folder={tmp_path}/jobs", "--", "--config=configs/debug.py"]
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), *options],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("job 42: logs ") == 2
    script = (tmp_path / "submitted").read_text()
    requests = [
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=60",
        "dependency=singleton",
        "partition=gpu",
    ]
    for request in requests:
        assert f"#SBATCH --{request}\n" in script, script
    assert "--kill-on-bad-exit=1" in script


@pytest.mark.slow
def test_an_alarm_in_the_last_interval_ends_all_once_the_state_is_saved(folder, tmp_path):
    more = [
        "--config.train.num_steps=4",
        "--config.train.log_every=4",
        "--config.alarms.entropy=1.0",
        "--config.alarms.stop=entropy",
        "--config.train.batch_size=128",  # a single batch to evaluate
    ]
    with started(folder, 2, 2, training(folder, tmp_path / "run", *more)) as processes:
        codes, _, errors = ends(processes)
    assert codes == [1, 1], errors
    assert "alarms.stop: entropy in layer 0: " in errors[0] and "saved step 4" in errors[0]
    assert "process 0 failed on" in errors[1]
    assert (tmp_path / "run/checkpoints/4").exists()
    assert '"eval/loss"' not in (tmp_path / "run/metrics.jsonl").read_text()


HANGS = """
import sys, time
from moejax.cli import main
from moejax.training import program
real, calls = program.put_batch, []
def put_batch_that_hangs(batch, trainable):
    calls.append(1)
    if len(calls) == 6:  # the first compiles
        time.sleep(600)
    return real(batch, trainable)
program.put_batch = put_batch_that_hangs
sys.exit(main(sys.argv[1:]))
"""


def test_a_step_that_hangs_ends_the_process_with_step_mesh_and_stacks(folder, tmp_path):
    more = ["--config.train.step_limit_s=3.0", "--config.mesh.expert=1", "--config.mesh.tensor=1"]
    command = training(folder, tmp_path / "run", *more)(0, [])
    with started(folder, 1, 1, lambda index, flags: ["-c", HANGS, *command[2:]]) as processes:
        (code,), _, (errors,) = ends(processes)
    assert code == 3, errors
    what = "moejax: step 5 has taken more than 3 s (train.step_limit_s=3)"
    assert f"{what} in process 0 of 1, on mesh data 1," in errors
    assert "in put_batch_that_hangs" in errors and "Thread 0x" in errors


CONNECTED = """
import sys, time
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from moejax.sharding import MESH_AXES
from moejax.training.multihost import processes
from moejax.training.multihost.signals import StopSignals
from moejax.training.step import put_batch, rows_of_process
folder, address = sys.argv[1], sys.argv[2].split("=")[1]
index = int(sys.argv[4].split("=")[1])

class Setup:
    pass

def write_or_read():
    if index == 0:
        time.sleep(1)
        open(folder + "/written", "w").write("by 0")
    return open(folder + "/written").read()

def fails():
    raise ValueError("no such thing")

with processes.initialize_distributed(address, 2, index):
    read = processes.primary_first(write_or_read)
    print("read", read, processes.broadcast_from_primary(str(index)))
    a, b, c, d = jax.devices()
    devices = np.reshape([a, c, b, d], (4, *[1] * (len(MESH_AXES) - 1)))
    Setup.mesh = mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rows = rows_of_process(mesh, 8)
    batch = put_batch(np.arange(8)[rows], Setup)
    held = {s.index[0].start: s.data.tolist() for s in batch.addressable_shards}
    is_held = all(values == [start, start + 1] for start, values in held.items())
    print("rows", rows, is_held, batch.shape)
    signals = StopSignals()
    stop = processes.SharedStop(signals, mesh)
    polls = [stop.poll()]
    signals.received = "SIGINT" if index == 1 else None
    print("polls", polls + [stop.poll(), stop.poll(), stop.poll()], stop.received)
    for function in (fails, fails if index == 1 else time.ctime):
        try:
            processes.primary_first(function)
        except Exception as error:
            print(type(error).__name__, error)
    sys.stdout.flush()
"""


def test_processes_read_after_the_first_wrote_and_stop_and_fail_together(folder, tmp_path):
    def command(index, flags):
        return ["-c", CONNECTED, str(tmp_path), *flags]

    with started(folder, 2, 2, command) as processes:
        codes, outputs, errors = ends(processes)
    assert codes == [0, 0], errors
    host = socket.gethostname()
    printed = [own_lines(output) for output in outputs]
    # The mesh takes turns between the processes, as on a TPU pod: a process's rows are apart.
    assert printed[0] == [
        "read by 0 0",
        "rows [0, 1, 4, 5] True (8,)",
        "polls [False, False, True, True] SIGINT",
        "ValueError no such thing",
        f"ProcessError process 1 failed on {host}; its own message says why",
    ]
    assert printed[1] == [
        "read by 0 0",
        "rows [2, 3, 6, 7] True (8,)",
        "polls [False, False, True, True] SIGINT",
        f"ProcessError process 0 failed on {host}; its own message says why",
        "ValueError no such thing",
    ]


WAITS_BRIEFLY = """
import sys
from moejax.cli import main
from moejax.training.run_directory import layout
layout.SHARED_SECONDS = 0.5
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_directory_that_is_not_shared_is_refused_by_name_and_ends_all(folder, tmp_path):
    def command(index, flags):
        return ["-c", WAITS_BRIEFLY, *training(folder, tmp_path / f"run{index}")(index, flags)[2:]]

    with started(folder, 2, 2, command) as processes:
        codes, _, errors = ends(processes)
    assert codes == [1, 2], errors
    assert f"process 1 failed on {socket.gethostname()}" in errors[0]
    workdir = f"--workdir={tmp_path}/run1 on {socket.gethostname()}, process 1,"
    assert f"moejax: {workdir} is not the folder" in errors[1]
    assert "Traceback" not in errors[0] + errors[1]


@pytest.mark.slow
def test_values_that_are_not_finite_are_found_by_all_and_named_by_one(folder, tmp_path):
    values = {
        "optimizer.learning_rate": 1e25,
        "optimizer.clip_norm": 0.0,
        "train.max_nonfinite_steps": 2,
        "mesh.tensor": 1,
        "moe.num_experts": 0,  # compiles faster
    }
    more = [f"--config.{key}={value}" for key, value in values.items()]
    with started(folder, 2, 1, training(folder, tmp_path / "run", *more)) as processes:
        codes, _, errors = ends(processes)
    assert codes == [1, 1], errors
    pattern = r"not finite in 2 steps in a row, .*the first such value is in "
    assert re.search(pattern, errors[0].splitlines()[-1])
    assert own_lines(errors[1]) == [
        f"moejax: process 0 failed on {socket.gethostname()}; its own message says why"
    ]


FAILS_IN_ONE = """
import sys
from moejax.cli import main
from moejax.cli.verbs import train
from moejax.training.multihost import processes
processes.LOST_SECONDS = 5
def fails_in_one(*arguments, **keywords):
    if not processes.is_first():
        raise LookupError("only here")
    processes.wait_for_all()
train.train = fails_in_one
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_fails_ends_at_once_with_its_traceback_and_all_fail(folder, tmp_path):
    def command(index, flags):
        return ["-c", FAILS_IN_ONE, *training(folder, tmp_path / "run")(index, flags)[2:]]

    with started(folder, 2, 2, command) as processes:
        codes, _, errors = ends(processes)
    assert codes[1] == 1 and codes[0] not in (0, None), errors
    assert errors[1].rstrip().endswith("LookupError: only here") and "Traceback" in errors[1]


TRAIN = ["train", f"--config={REPOSITORY / 'configs/debug.py'}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--num_processes=2 needs --coordinator=HOST:PORT"),
        (["--process_id=0"], "--process_id=0 needs --coordinator=HOST:PORT"),
        (["--coordinator=a:1"], "--coordinator=a:1 needs --num_processes, too; add it"),
        (
            ["--coordinator=a:1", "--num_processes=2"],
            "--coordinator=a:1 needs --process_id, too; add it",
        ),
        (
            ["--coordinator=a", "--num_processes=2", "--process_id=0"],
            "--coordinator=a must be HOST:PORT",
        ),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be between 0 and --num_processes=2 less one",
        ),
        (
            ["--coordinator=a:1", "--distributed"],
            "--distributed and --coordinator=a:1 exclude each other; give one",
        ),
    ],
)
def test_half_given_and_contradictory_flags_are_refused(flags, message, capsys):
    assert main(TRAIN + flags) == 2
    assert message in capsys.readouterr().err


def test_distributed_without_a_cluster_in_the_environment_says_what_it_looked_for(folder):
    arguments = training(folder, folder / "none", "--distributed")
    with started(folder, 1, 1, arguments) as processes:
        codes, _, (errors,) = ends(processes)
    assert codes == [1] and not (folder / "none").exists()
    (line,) = errors.splitlines()
    assert re.search(r"did not find each other by the environment .*; launch them by srun", line)
    assert "mpirun, " in line and "--coordinator=HOST:PORT" in line


LAUNCHED = {
    "SLURM_STEP_NUM_TASKS": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMI_SIZE": "2",
    "MV2_COMM_WORLD_SIZE": "2",
    "JSM_NAMESPACE_SIZE": "2",
    "FLUX_JOB_SIZE": "2",
    "WORLD_SIZE": "2",
    "PMIX_RANK": "1",
    "TPU_WORKER_HOSTNAMES": "host1,host2",
}


@pytest.mark.parametrize(
    "verb", ["train", "eval", "generate", "report", "counterfactuals", "placement"]
)
def test_several_launched_processes_that_would_each_train_alone_are_refused(
    verb, monkeypatch, capsys
):
    remedy = "add --distributed, or launch one" if verb == "train" else "launch one"
    for variable, value in LAUNCHED.items():
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            assert main(TRAIN if verb == "train" else [verb, "--workdir=nowhere"]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith(f"moejax: moejax {verb} ")
        assert captured.endswith(f" ({variable}={value}); {remedy}\n")


def test_one_launched_process_is_no_reason_to_refuse(monkeypatch):
    for variable in LAUNCHED:
        monkeypatch.setenv(variable, "0" if variable == "PMIX_RANK" else "1")
    assert processes.launched() == (1, "")


def test_a_port_in_use_and_a_missing_process_are_named_within_the_stated_wait(folder):
    def without_process_1(index, flags):
        command = training(folder, folder / "none", "--wait_s=2")
        return command(0, [flags[0], "--num_processes=2", "--process_id=0"])

    with started(folder, 2, 1, without_process_1) as started_processes:
        codes, _, errors = ends(started_processes)
    assert codes == [1, 1] and not (folder / "none").exists()
    lines = sorted(own_lines(errors[0]) + own_lines(errors[1]))
    assert len(lines) == 2, errors
    assert lines[0].startswith("moejax: process 0 cannot listen at port ")
    assert "choose another port" in lines[0]
    assert lines[1].startswith("moejax: process 1 of 2 did not come to process 0 on ")
    assert "within 2 s" in lines[1]


def test_processes_of_different_configurations_are_refused_before_a_write(folder):
    def other_rate(index, flags):
        more = ["--config.optimizer.learning_rate=0.5"] if index else []
        return training(folder, folder / "none", *more)(index, flags)

    with started(folder, 2, 1, other_rate) as started_processes:
        codes, _, errors = ends(started_processes)
    assert codes == [1, 1] and not (folder / "none").exists()
    (line,) = own_lines(errors[1])
    assert re.search(
        r"process 1 on \S+ has optimizer\.learning_rate=0\.5, and process 0 has [\d.]+;", line
    )
    assert "process 1 failed" in errors[0]
