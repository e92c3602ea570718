"""Several processes that train one model: how they start, agree, and end together.

Each process runs the same program on its own devices, and all devices make one mesh. Process 0
alone writes the run directory, except for checkpoints, of which each process writes its part. What
is decided from files or signals is decided once and broadcast to all: a process that took another
branch would leave the others waiting in a collective for ever.

Waiting goes through jax's coordination service, not through a collective of the devices: gloo,
which is the latter on CPU, gives up after 30 seconds, and one process may prepare data for an hour.
The service also notices a process that is gone, and ends the others.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.sharding import replicated
from moejax.training.multihost.partners import Partners
from moejax.training.multihost.roll_call import RollCallError, call_roll
from moejax.training.multihost.signals import ALARM, StopSignals

LOST_SECONDS = 30
"""A process that sends no heartbeat for this long is given up, and the run with it."""

WAIT_SECONDS = 24 * 3600
"""The timeout of a barrier between processes that are alive: one may be preparing data."""

FAILURE_REPORT_SECONDS = 1.0
"""How long a process that failed waits for a report that another one had ended before it."""

SHUTDOWN_SECONDS = 2.0
"""How much longer process 0 lives after a failure.

It runs jax's coordination service: were it to end first, the service would end the other processes
before they could say why they fail.
"""

START_WAIT_S = 30.0
"""How long processes wait for each other at the start by default."""

CONNECT_SECONDS = 120
"""The timeout of jax's own service, which starts once all processes are known to be there."""

LAUNCHERS = (
    "SLURM_STEP_NUM_TASKS",  # srun
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI, Cray
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "JSM_NAMESPACE_SIZE",  # jsrun
    "FLUX_JOB_SIZE",  # flux run
    "WORLD_SIZE",  # torchrun
)
"""Environment variables in which launchers say how many processes they started."""

RANKS = ("PMIX_RANK",)  # prterun
"""Environment variables in which launchers number processes without saying how many there are."""

STOPS = {number.name: number.value for number in (signal.SIGINT, signal.SIGTERM)} | {ALARM: 128}
"""Reasons to stop, by the number that processes send each other."""

T = TypeVar("T")

_connected: list[Partners] = []  # holds one entry while this process is connected to others

_num_calls = itertools.count()  # every process makes the same calls of `_gather` in the same order


class ProcessError(RuntimeError):
    """Processes that cannot connect, or one that ends because another has failed."""


def launched() -> tuple[int, str]:
    """Returns how many processes, at least, a launcher started, and the variable that says so.

    Returns:
      (1, "") if no variable of a launcher says that there are several.
    """
    for variable in LAUNCHERS:
        number = _read_number(variable)
        if number > 1:
            return number, f"{variable}={number}"
    for variable in RANKS:
        rank = _read_number(variable)
        if rank > 0:
            return rank + 1, f"{variable}={rank}"
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1:
        return len(hosts), f"TPU_WORKER_HOSTNAMES={','.join(hosts)}"
    return 1, ""


def _read_number(variable: str) -> int:
    """Returns the number in an environment variable; 0 if there is none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


@contextlib.contextmanager
def initialize_distributed(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_s: float = START_WAIT_S,
) -> Iterator[None]:
    """Connects the processes: within the context, jax sees the devices of all of them.

    Must be entered before anything touches a device. At the end every process waits for the others.
    After an error no process is waited for: call `leave_at_once`.

    Args:
      coordinator: HOST:PORT at which process 0 listens. Empty: it and the numbers come from the
        environment, which jax knows of SLURM, Open MPI, TPU pods and Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      wait_s: how long they wait for each other at the start.

    Raises:
      ProcessError: the environment does not say where process 0 listens, or the processes did
        not find each other.
      RollCallError: a process is missing, comes twice, or runs something else.
    """
    where = coordinator or "the environment"
    # The preemption service would take SIGTERM from `StopSignals`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        coordinator, num_processes, process_id = _complete_address(
            coordinator, num_processes, process_id, wait_s
        )
        links = call_roll(coordinator, num_processes, process_id, wait_s)
        _connected.append(Partners(links))
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except RollCallError:
        raise
    except (ValueError, RuntimeError) as error:  # jax's own, and those of the service
        text = str(error) or type(error).__name__
        raise ProcessError(
            f"the processes did not find each other by {where} ({text.splitlines()[0]}); launch "
            "them by srun, mpirun, or on a TPU pod or GKE with --distributed, or give each "
            "--coordinator=HOST:PORT of process 0, --num_processes and --process_id"
        ) from error
    yield
    wait_for_all()
    _disconnect("done")
    jax.distributed.shutdown()


def _complete_address(
    coordinator: str, num_processes: int | None, process_id: int | None, wait_s: float
) -> tuple[str, int, int]:
    """Returns the coordinator's address, the number of processes and the number of this one.

    What is not given comes from the environment.

    Raises:
      ValueError: the environment does not say.
    """
    if coordinator and num_processes is not None and process_id is not None:
        return coordinator, num_processes, process_id
    from jax._src import clusters  # jax looks there itself, and has no public name for it

    address, number, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator or None, num_processes, process_id, None, None, max(1, round(wait_s))
    )
    if not address or number is None or index is None:
        raise ValueError("it names no coordinator, number of processes and number of this process")
    return address, number, index


def await_word_of_others() -> None:
    """Returns once it was reported which process is gone, or after a moment if none is.

    A process that is gone breaks the collectives of the others, and their tracebacks should
    not come first.
    """
    for partners in _connected:
        partners.has_reported.wait(FAILURE_REPORT_SECONDS)


def agree(values: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Checks that all processes have the same values as process 0.

    Args:
      values: sections of leaves that JSON can hold.
      name: what they are, for the message.

    Raises:
      ProcessError: they differ, or do in another process.
    """
    primary_values = json.loads(broadcast_from_primary(json.dumps(values)))

    def compare() -> None:
        for section, leaves in values.items():
            for leaf, value in leaves.items():
                primary_value = primary_values.get(section, {}).get(leaf)
                if value != primary_value:
                    process = f"process {jax.process_index()} on {socket.gethostname()}"
                    raise ProcessError(
                        f"{process} has {section}.{leaf}={value}, and process 0 has "
                        f"{primary_value}; give all processes the same {name}"
                    )

    raise_on_all(compare)


def has_others() -> bool:
    """Whether this process is connected to others."""
    return jax.distributed.is_initialized()


def leave_at_once(code: int) -> NoReturn:
    """Ends a process that failed, so that the others fail too.

    An ordinary exit would wait for the others, and they would wait for this process.
    """
    _disconnect("failed")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _disconnect(state: str) -> None:
    """Tells the other processes that this one ends: "done" or "failed"."""
    while _connected:
        _connected.pop().leave(state)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has called this."""
    _gather("")


def broadcast_from_primary(word: str) -> str:
    """Returns the word that process 0 passes; every process must call this."""
    return _gather(word)[0]


def gather_from_all(word: str) -> list[str]:
    """Returns the words that all processes pass, by process; every process must call this."""
    return _gather(word)


def primary_first(function: Callable[[], T]) -> T:
    """Calls a function in process 0 and, once that has succeeded, in the others.

    Process 0 may write files that the others then read.

    Raises:
      ProcessError: it failed in another process, which says why.
    """
    if is_first():
        result = raise_on_all(function)
        raise_on_all(lambda: None)
        return result
    raise_on_all(lambda: None)
    return raise_on_all(function)


def raise_on_all(function: Callable[[], T]) -> T:
    """Calls a function in every process; if it fails in one, it raises in all.

    Raises:
      ProcessError: it failed in another process, which says why.
    """
    failure = None
    try:
        result = function()
    except Exception as error:  # raised below, once the others know
        failure = error
    outcomes = _gather(f"failed on {socket.gethostname()}" if failure else "")
    if any(outcomes):
        for partners in _connected:
            partners.expect_their_end()
        if len(outcomes) > 1 and is_first():
            time.sleep(SHUTDOWN_SECONDS)
    if failure:
        raise failure
    for index, outcome in enumerate(outcomes):
        if outcome:
            raise ProcessError(f"process {index} {outcome}; its own message says why")
    return result


def _gather(word: str) -> list[str]:
    """Returns the words that all processes pass, by process; waits for all of them."""
    if jax.process_count() == 1:
        return [word]
    from jax._src import distributed  # no public name waits without a collective of the devices

    client: Any = distributed.global_state.client
    if client is None:
        raise ProcessError(
            f"{jax.process_count()} processes are not connected; use --distributed, or "
            "processes.initialize_distributed"
        )
    call = f"moejax/{next(_num_calls)}"
    client.key_value_set(f"{call}/{jax.process_index():08d}", word)
    client.wait_at_barrier(call, WAIT_SECONDS * 1000)
    # Keys end with the process's number, padded with zeros: their order is that of the processes.
    return [word for _, word in sorted(client.key_value_dir_get(call))]


class SharedStop:
    """A request to stop that any process may make and that all grant at the same step.

    In a single process it is that process's signals. Several processes send theirs into a maximum
    over the devices at each `poll` and read the answer to the `poll` before, so that none of them
    waits for the step under way.

    Args:
      own: this process's signals, and requests named in `STOPS`.
      mesh: of all devices.

    Attributes:
      is_shared: whether there are several processes.
    """

    def __init__(self, own: StopSignals, mesh: Mesh):
        self._own = own
        self.is_shared = jax.process_count() > 1
        self._granted: str | None = None
        self._pending: jax.Array | None = None  # the maximum that the last `poll` asked for
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    @property
    def received(self) -> str | None:
        """The signal's name, or None."""
        return self._granted if self.is_shared else self._own.received

    def __bool__(self) -> bool:
        return self.received is not None

    def poll(self) -> bool:
        """Returns whether to stop. Every process must call this equally often."""
        if self.is_shared:
            answer = self._pending
            self._pending = self._ask()
            if answer is not None and self._granted is None:
                self._granted = _stop_by_number(int(answer))
        return bool(self)

    def _ask(self) -> jax.Array:
        """Starts the maximum of all processes' requests, as a number of `STOPS` or 0."""
        number = STOPS[self._own.received] if self._own.received else 0
        numbers = np.full(len(self._by_device.addressable_devices), number, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._by_device, numbers))


def _stop_by_number(number: int) -> str | None:
    """Returns the reason to stop of that number in `STOPS`; None for 0."""
    for name, known in STOPS.items():
        if known == number:
            return name
    return None
