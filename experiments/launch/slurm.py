"""Submits `moejax train` to SLURM through submitit: a process for each GPU, on one or more nodes.

  python experiments/launch/slurm.py --nodes=2 --gpus_per_node=8 --minutes=240 --jobs=3 \
      --partition=NAME -- --config=configs/small_moe.py --workdir=runs/small \
      --config.mesh.fsdp=16 --config.train.batch_size=16

What follows `--` goes to `moejax train`. The folder one submits from, the environment and the run
directory must be on a file system that all nodes share. `--jobs=3` queues three jobs, each of which
starts when the one before has ended and continues its run. `--cluster=local` starts the processes
on this machine instead.

submitit hands what it runs from process to process as a pickle in `--folder`; here that is a
command, a list of words, and nothing else. moejax itself reads no pickles.
"""

import argparse
import shlex
import socket
import sys
from pathlib import Path

import submitit
from submitit.helpers import CommandFunction

SECONDS_TO_SAVE = 120
"""Seconds before its time is up at which a job is asked to save."""

SECONDS_TO_END = 10
"""Seconds before its time is up at which submitit's own signal ends what still runs."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options of the job; what follows `--` is in `train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, help="0: one process on each node, on its CPU"
    )
    parser.add_argument("--cpus_per_task", type=int, default=8)
    parser.add_argument(
        "--mem_gb", type=int, default=0, help="memory of a node; 0: as the cluster has it"
    )
    parser.add_argument("--minutes", type=int, default=240)
    parser.add_argument(
        "--jobs", type=int, default=1, help="jobs, one after another, that continue one run"
    )
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument(
        "--name",
        default="moejax",
        help="of the job; jobs of one name and user run one after another",
    )
    parser.add_argument(
        "--folder", default="runs/slurm", help="scripts, logs and pickles of submitit"
    )
    parser.add_argument("--local_processes", type=int, default=2, help="--cluster=local: how many")
    parser.add_argument(
        "--wait", action="store_true", help="until the jobs have ended; exits 1 if one failed"
    )
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, train = arguments[:split], arguments[split + 1 :]
    options = parser.parse_args(own)
    if not train:
        parser.error("nothing to train; give the flags of moejax train after --")
    if options.minutes * 60 <= 2 * SECONDS_TO_SAVE:
        parser.error(
            f"--minutes={options.minutes} must be more than {2 * SECONDS_TO_SAVE // 60}, "
            "to start and to save"
        )
    options.train = train
    return options


def command(options: argparse.Namespace) -> list[str]:
    """Returns the command of each process.

    On a cluster `timeout` sends it SIGTERM, on which it saves, whatever signals the cluster sends.
    """
    train = [sys.executable, "-m", "moejax", "train", *options.train]
    if options.cluster == "slurm":
        seconds = options.minutes * 60 - SECONDS_TO_SAVE
        timeout = ["timeout", "--preserve-status", "--signal=TERM", str(seconds)]
        return [*timeout, *train, "--distributed"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={options.local_processes}"]
    return ["bash", "-c", f'exec {shlex.join(train)} --process_id="$SUBMITIT_LOCAL_GLOBALID"']


def make_executor(options: argparse.Namespace) -> submitit.AutoExecutor:
    """Returns the executor with all parameters of the job."""
    executor = submitit.AutoExecutor(folder=Path(options.folder) / "%j", cluster=options.cluster)
    if options.cluster == "local":
        executor.update_parameters(
            timeout_min=options.minutes, tasks_per_node=options.local_processes
        )
        return executor
    parameters = {
        "name": options.name,
        "nodes": options.nodes,
        "tasks_per_node": max(1, options.gpus_per_node),
        "cpus_per_task": options.cpus_per_task,
        "timeout_min": options.minutes,
        "slurm_signal_delay_s": SECONDS_TO_END,
        "slurm_additional_parameters": {"dependency": "singleton"},
        # Ends the other processes of a job in which one has failed.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }
    if options.gpus_per_node:
        parameters["gpus_per_node"] = options.gpus_per_node
    if options.mem_gb:
        parameters["mem_gb"] = options.mem_gb
    for name in ("partition", "account"):
        if getattr(options, name):
            parameters[f"slurm_{name}"] = getattr(options, name)
    executor.update_parameters(**parameters)
    return executor


def main() -> int:
    """Submits the jobs, and prints their ids and where their logs are."""
    options = parse(sys.argv[1:])
    executor = make_executor(options)
    jobs = []
    for _ in range(options.jobs):
        # A command for each: local processes of each job meet at a port of their own.
        function = CommandFunction(command(options), cwd=Path.cwd())
        jobs.append(executor.submit(function))
    for job in jobs:
        print(f"job {job.job_id}: logs {job.paths.stdout}, {job.paths.stderr}")
    if options.wait or options.cluster == "local":
        return int(any(job.exception() is not None for job in jobs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
