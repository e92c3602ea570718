"""Kills one of two processes: the other ends with a line that names it, and both can continue."""

import socket
import time

import numpy as np

from soak.field import Field, difference, end

MESH = ("--config.mesh.data=2",)


def trial(field: Field, seed: int) -> str:
    """Kills one of two processes, starts both again, and returns what differs or failed."""
    rng = np.random.default_rng(seed)
    workdir = field.new_run(f"partners-{seed}")
    processes = _start_both(field, workdir)
    time.sleep(rng.uniform(1.0, 10.0))
    victim = int(rng.integers(2))
    was_over = processes[victim].poll() is not None
    processes[victim].kill()
    ends = [end(process) for process in processes]
    survivor = 1 - victim
    code, errors = ends[survivor]
    if not was_over and code is None:
        return f"process {survivor} did not end: {errors[-600:]}"
    if not was_over and code != 0 and "moejax: " not in errors:
        return f"process {survivor} said nothing of its own: {errors[-600:]}"
    ends = [end(process) for process in _start_both(field, workdir)]
    for index, (code, errors) in enumerate(ends):
        if code:
            again = f"process {index} ended with exit code {code} when started again"
            return f"{again}: {errors[-600:]}"
    return difference(workdir, field.undisturbed_by_two)


def _start_both(field, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
        address = f"127.0.0.1:{port}"
    flags = [f"--coordinator={address}", "--num_processes=2", "--wait_s=120"]
    return [field.start(workdir, *MESH, *flags, f"--process_id={index}") for index in range(2)]
