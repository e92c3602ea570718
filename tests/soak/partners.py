"""When one of two processes dies, the other ends with a line that names it, and both continue to the same end."""

import socket
import time

import numpy as np

from soak.field import Field, difference, end

MESH = ("--config.mesh.data=2",)


def trial(field: Field, seed: int) -> str:
    """Kills one of two processes at some time, starts both again, and compares; says what was wrong."""
    rng = np.random.default_rng(seed)
    workdir = field.new_run(f"partners-{seed}")
    processes = _start_both(field, workdir)
    time.sleep(rng.uniform(1.0, 10.0))
    victim = int(rng.integers(2))
    was_over = processes[victim].poll() is not None
    processes[victim].kill()
    ends = [end(process) for process in processes]
    code, errors = ends[1 - victim]
    if not was_over and code is None:
        return f"process {1 - victim} did not end: {errors[-600:]}"
    if not was_over and code != 0 and "moejax: " not in errors:
        return f"process {1 - victim} said nothing of its own: {errors[-600:]}"
    ends = [end(process) for process in _start_both(field, workdir)]
    for index, (code, errors) in enumerate(ends):
        if code:
            return (
                f"process {index} ended with exit code {code} when started again: {errors[-600:]}"
            )
    return difference(workdir, field.undisturbed_by_two)


def _start_both(field, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={address}", "--num_processes=2", "--wait_s=120"]
    return [field.start(workdir, *MESH, *flags, f"--process_id={index}") for index in range(2)]
