"""SIGINT and SIGTERM as requests to stop: the loop finishes its step, saves and ends.

Python runs a handler only once the main thread is back from compiled code, and a compilation may
take minutes. `SignalWatch` answers meanwhile, from a thread.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 1.0
"""How long the first signal may go unanswered; a second SIGINT interrupts only after as long."""

ALARM = "ALARM"
"""A reason to stop that is not a signal: `training/health/alarms.py`."""

log = logging.getLogger("moejax")


class StopSignals:
    """Remembers the first SIGINT or SIGTERM that arrives while it is entered.

    Later SIGTERMs change nothing: `make` and schedulers often send the same signal twice. A second
    SIGINT, `GRACE_SECONDS` or more after the first, interrupts at once. Outside the main thread,
    where handlers cannot be set, no signal is received.

    Attributes:
      received: the signal's name, or the reason of a `request` that came before it.
      signal: the signal's name, also if another reason was the first.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.signal: str | None = None
        self._signalled_at = 0.0
        self._depth = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def request(self, reason: str) -> None:
        """Asks for a stop as a signal does; the first reason counts."""
        if self.received is None:
            self.received = reason

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; raises `KeyboardInterrupt` for a second SIGINT."""
        _note_answer()
        now = time.monotonic()
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._signalled_at = now
            self.request(self.signal)
            log.info("%s: stopping after the work at hand", self.signal)
        elif number == signal.SIGINT and now - self._signalled_at >= GRACE_SECONDS:
            raise KeyboardInterrupt


class SignalWatch:
    """Watches for signals that no handler has answered, while it is entered.

    It prints what such a signal waits for, and ends the process at a second SIGINT. Entered outside
    the main thread, where signals cannot be watched, it does nothing.
    """

    def __init__(self) -> None:
        self._read_end = self._write_end = -1
        self._previous_fd = -1
        self._previous_handler: object = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # Whatever the main thread does, the signal's number is written there at once.
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous_handler = signal.signal(signal.SIGINT, _interrupt)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        signal.signal(signal.SIGINT, self._previous_handler)  # type: ignore[arg-type]
        os.close(self._write_end)  # which ends the thread
        self._thread.join()
        os.close(self._read_end)
        self._thread = None

    def _watch(self) -> None:
        """Reads the numbers of signals until the pipe is closed."""
        waiting = _WaitingSignal()
        while True:
            timeout = GRACE_SECONDS / 4 if waiting.is_to_report else None
            can_read, _, _ = select.select([self._read_end], [], [], timeout)
            number = os.read(self._read_end, 1) if can_read else None
            if number == b"":
                return
            waiting.check_answered()
            if number and number[0] in (signal.SIGINT, signal.SIGTERM):
                waiting.receive(number[0])
            waiting.report_if_late()


class _WaitingSignal:
    """A signal that no handler has answered yet; there may be none.

    Attributes:
      is_to_report: whether there is one that has not been reported.
    """

    def __init__(self) -> None:
        self._name = ""
        self._since: float | None = None
        self._is_reported = False

    @property
    def is_to_report(self) -> bool:
        return self._since is not None and not self._is_reported

    @property
    def _is_late(self) -> bool:
        return self._since is not None and time.monotonic() - self._since >= GRACE_SECONDS

    def check_answered(self) -> None:
        """Forgets the signal if a handler has run since."""
        if self._since is not None and _answered_at >= self._since:
            self._since = None
            self._is_reported = False

    def receive(self, number: int) -> None:
        """Takes a signal; ends the process if it is a second SIGINT that comes late."""
        if self._since is None:
            # The handler may have run before its number was read here.
            self._since = time.monotonic() - GRACE_SECONDS / 4
            self._name = signal.Signals(number).name
        elif number == signal.SIGINT and self._is_late:
            _print_error(f"a second SIGINT during {_work}: leaving at once")
            os._exit(130)

    def report_if_late(self) -> None:
        """Prints once what the signal waits for, when the grace period is over."""
        if self._is_late and not self._is_reported:
            _print_error(
                f"{self._name}: {_work} cannot be interrupted; moejax stops after it. "
                "A second Ctrl-C leaves at once"
            )
            self._is_reported = True


@contextlib.contextmanager
def uninterrupted(work: str) -> Iterator[None]:
    """Names the work of the main thread for whoever sends a signal while the context is entered.

    Args:
      work: such as "compiling the train step".
    """
    global _work
    before, _work = _work, work
    try:
        yield
    finally:
        _work = before


_work = "what is being compiled or computed"
_answered_at = 0.0


def _note_answer() -> None:
    """Notes that a handler runs: the main thread is back from compiled code."""
    global _answered_at
    _answered_at = time.monotonic()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _note_answer()
    raise KeyboardInterrupt


def _print_error(text: str) -> None:
    """Writes to standard error, not through `logging`, whose locks the main thread may hold."""
    os.write(2, f"moejax: {text}\n".encode())
