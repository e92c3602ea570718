"""Several processes that train one model: how they meet, agree, and end together.

Each process runs the same program on its own devices, and all devices make one mesh. Process 0
alone writes the run directory, but for checkpoints, of which each writes its part. What is decided
from files or signals is decided once and told to all: a process that went another way would leave
the others waiting in a collective for ever.

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
"""A process that has not been heard of for so long is given up, and with it the run."""

WAIT_SECONDS = 24 * 3600
"""For a process that lives: it may be preparing data."""

WORD_SECONDS = 1.0
"""How long a process that failed waits to hear that another one had ended before."""

FAREWELL_SECONDS = 2.0
"""How much longer process 0 lives after a failure: when it goes, the service goes and ends the others unheard."""

MEETING_S = 30.0
"""How long processes wait for each other at the start, unless they are told otherwise."""

CONNECT_SECONDS = 120
"""For jax's own service, once all processes are known to be there."""

LAUNCHERS = (
    "SLURM_STEP_NUM_TASKS",  # srun
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI, Cray
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "JSM_NAMESPACE_SIZE",  # jsrun
    "FLUX_JOB_SIZE",  # flux run
    "WORLD_SIZE",  # torchrun
)
"""Variables in which launchers say how many processes they started."""

RANKS = ("PMIX_RANK",)  # prterun
"""Variables in which launchers number processes without saying how many there are."""

STOPS = {number.name: number.value for number in (signal.SIGINT, signal.SIGTERM)} | {ALARM: 128}
"""Reasons to stop, by the number that processes send each other."""

T = TypeVar("T")

_connected: list[Partners] = []  # while this process has met others: one

_calls = itertools.count()  # every process makes the same calls of `_gather` in the same order


class ProcessError(RuntimeError):
    """Processes that cannot meet, or one that ends because another has failed."""


def launched() -> tuple[int, str]:
    """How many processes, at least, a launcher started together with this one, and what says so; (1, "") if none."""
    for variable in LAUNCHERS:
        if _number(variable) > 1:
            return _number(variable), f"{variable}={_number(variable)}"
    for variable in RANKS:
        if _number(variable) > 0:
            return _number(variable) + 1, f"{variable}={_number(variable)}"
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return (len(hosts), f"TPU_WORKER_HOSTNAMES={','.join(hosts)}") if len(hosts) > 1 else (1, "")


def _number(variable: str) -> int:
    """The number in an environment variable; 0 if there is none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


@contextlib.contextmanager
def meet(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_s: float = MEETING_S,
) -> Iterator[None]:
    """Within it, the devices of all processes are one machine's; must begin before anything touches a device.

    At the end every process waits for the others. After an error nobody is waited for: call
    `leave_at_once`.

    Args:
      coordinator: HOST:PORT at which process 0 listens. Empty: it and the numbers come from the
        environment, which jax knows of SLURM, Open MPI, TPU pods and Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      wait_s: how long they wait for each other at the start.

    Raises:
      ProcessError: there is nothing of the kind in the environment, or they did not
        find each other.
      RollCallError: a process is missing, comes twice, or runs something else.
    """
    where = coordinator or "the environment"
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it would take SIGTERM from `StopSignals`
    try:
        coordinator, num_processes, process_id = _find_all(
            coordinator, num_processes, process_id, wait_s
        )
        _connected.append(Partners(call_roll(coordinator, num_processes, process_id, wait_s)))
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
        raise ProcessError(
            f"the processes did not meet by {where} ({(str(error) or type(error).__name__).splitlines()[0]}); launch "
            "them by srun, mpirun, or on a TPU pod or GKE with --distributed, or give each --coordinator=HOST:PORT of "
            "process 0, --num_processes and --process_id"
        ) from error
    yield
    wait_for_all()
    _part("done")
    jax.distributed.shutdown()


def _find_all(
    coordinator: str, num_processes: int | None, process_id: int | None, wait_s: float
) -> tuple[str, int, int]:
    """The coordinator's address, the number of processes and this one's; what is not given comes from the environment.

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
    """Returns once it was said which process is gone, or after a moment if none is.

    A process that is gone breaks the collectives of the others, and their tracebacks should
    not come first.
    """
    for partners in _connected:
        partners.is_told.wait(WORD_SECONDS)


def agree(values: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Returns if all processes have the same values as process 0.

    Args:
      values: sections of leaves that JSON can hold.
      name: what they are, for the message.

    Raises:
      ProcessError: they differ, or do in another process.
    """
    of_first = json.loads(broadcast_from_primary(json.dumps(values)))

    def compare() -> None:
        for section, leaves in values.items():
            for leaf, value in leaves.items():
                other = of_first.get(section, {}).get(leaf)
                if value != other:
                    raise ProcessError(
                        f"process {jax.process_index()} on {socket.gethostname()} has {section}.{leaf}={value}, and "
                        f"process 0 has {other}; give all processes the same {name}"
                    )

    raise_on_all(compare)


def has_others() -> bool:
    """Whether this process has met others and not parted from them."""
    return jax.distributed.is_initialized()


def leave_at_once(code: int) -> NoReturn:
    """Ends a process that failed, so that the others fail too: a common exit would wait for them, and they for it."""
    _part("failed")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _part(word: str) -> None:
    """Tells the other processes that this one ends."""
    while _connected:
        _connected.pop().leave(word)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    _gather("")


def broadcast_from_primary(word: str) -> str:
    """What process 0 says; all must ask."""
    return _gather(word)[0]


def all_say(word: str) -> list[str]:
    """What each process says, in their order; all must ask."""
    return _gather(word)


def primary_first(function: Callable[[], T]) -> T:
    """Calls a function in process 0, which may write files, and when it has succeeded in the others, which read them.

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
    """Calls a function in every process; if it fails in one, all fail."""
    failure = None
    try:
        result = function()
    except Exception as error:  # passed on below, once the others know
        failure = error
    outcomes = _gather(f"failed on {socket.gethostname()}" if failure else "")
    if any(outcomes):
        for partners in _connected:
            partners.expect_their_end()
    if any(outcomes) and len(outcomes) > 1 and is_first():
        time.sleep(FAREWELL_SECONDS)
    if failure:
        raise failure
    for index, outcome in enumerate(outcomes):
        if outcome:
            raise ProcessError(f"process {index} {outcome}; its own message says why")
    return result


def _gather(word: str) -> list[str]:
    """What each process says, in their order; waits for all."""
    if jax.process_count() == 1:
        return [word]
    from jax._src import distributed  # no public name waits without a collective of the devices

    client: Any = distributed.global_state.client
    if client is None:
        raise ProcessError(
            f"{jax.process_count()} processes have not met; use --distributed, or processes.meet"
        )
    call = f"moejax/{next(_calls)}"
    client.key_value_set(f"{call}/{jax.process_index():08d}", word)
    client.wait_at_barrier(call, WAIT_SECONDS * 1000)
    return [said for _, said in sorted(client.key_value_dir_get(call))]


class SharedStop:
    """A wish to stop that is heard in any process and granted in all at the same step.

    In a single process it is that process's signals. Several send theirs into a maximum over the
    devices at each `poll` and read the answer to the `poll` before, so that nobody waits for the
    step under way.

    Args:
      own: this process's signals, and requests named in `STOPS`.
      mesh: of all devices.
    """

    def __init__(self, own: StopSignals, mesh: Mesh):
        self._own = own
        self._is_shared = jax.process_count() > 1
        self._granted: str | None = None
        self._asked: jax.Array | None = None
        self._devices = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    @property
    def received(self) -> str | None:
        """The signal's name, or None."""
        return self._granted if self._is_shared else self._own.received

    def __bool__(self) -> bool:
        return self.received is not None

    def poll(self) -> bool:
        """Whether to stop. Every process must ask equally often."""
        if self._is_shared:
            number = STOPS[self._own.received] if self._own.received else 0
            numbers = np.full(len(self._devices.addressable_devices), number, np.int32)
            before, self._asked = self._asked, self._largest(
                jax.make_array_from_process_local_data(self._devices, numbers)
            )  # fmt: skip
            if before is not None and self._granted is None and int(before):
                self._granted = next(
                    name for name, number in STOPS.items() if number == int(before)
                )
        return bool(self)
