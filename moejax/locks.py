"""One writer a folder: a lock that says who holds it, and that death releases.

Two mechanisms work together, because neither is enough alone:

- `flock` on `FOLDER/.lock`. The kernel releases it when the process ends, however it ends. Some
  shared file systems do not know it, and some keep it within one machine.
- A record in that file: who holds the lock, and a beat that the holder renews every few seconds.
  Where `flock` cannot decide, a second process watches the record by its own clock: clocks of two
  machines are never compared. A record that has not changed for the grace period belongs to a
  process that is gone.

A lock in object storage would hold the same record, created and renewed by conditional writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

__all__ = ["FolderLock", "HeldError", "LockedError", "check_held"]

BEAT_S = 5.0
"""Seconds between two beats of a holder."""

GRACE_S = 30.0
"""A record that has not changed for this long, as seen by an observer, belongs to a dead process."""

POLL_S = 0.5
"""Seconds between two looks at a lock that another process holds."""

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without `flock` answer."""

MAX_RECORD_BYTES = 4096

log = logging.getLogger("moejax")


class LockedError(ValueError):
    """A folder that another process writes, or that cannot be locked: the message says who, since when, what to do."""


class HeldError(LockedError):
    """A folder that another process writes: who can do without it may go on."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that a lock lives by; tests shorten them."""

    beat_s: float = BEAT_S
    grace_s: float = GRACE_S
    poll_s: float = POLL_S


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its record says.

    Attributes:
      pid: of the process; 0 if the record cannot be read.
      host: its machine.
      boot: identifies the machine from its start on; two machines may have one name.
      since: local time at which the lock was taken.
      does: what the process does, such as "train".
      nonce: differs between any two holders.
    """

    pid: int = 0
    host: str = "?"
    boot: str = ""
    since: str = "?"
    does: str = "?"
    nonce: str = ""

    def __str__(self) -> str:
        if not self.pid:
            return "a process that cannot be named"
        return f"process {self.pid} on {self.host} ({self.does}, since {self.since})"


class FolderLock:
    """A context in which this process alone writes a folder.

    Args:
      folder: what is locked; created if it is missing.
      does: what this process does there, for the message that others get: "train", "sweep worker".
      waits: wait until the holder ends, and say once who that is; otherwise a held lock
        is an error.
      timing: how often to beat and how long to watch.

    Raises:
      LockedError: on entry, if another process holds the lock or the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, does: str, *, waits: bool = False, timing: Timing | None = None
    ):
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self._waits = waits
        self._timing = timing or Timing()
        self._does = does
        self._me = Holder()
        self._file = -1
        self._made: list[Path] = []  # folders, the innermost first
        self._beats = 0
        self._is_lost = threading.Event()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        self._is_lost.clear()
        self._is_over.clear()
        self._file = self._open()
        try:
            self._acquire()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise LockedError(
                    f"{self.path} cannot be written ({error.strerror}); make room there, or choose another folder"
                ) from error
            raise
        self._thread = threading.Thread(
            target=self._beat_on, name=f"lock of {self.folder}", daemon=True
        )
        self._thread.start()
        _held.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _held.discard(self)
        self._is_over.set()
        if self._thread:
            self._thread.join()
        if self._file >= 0 and not (self._is_lost.is_set() or self._is_taken()):
            with contextlib.suppress(
                OSError
            ):  # a disk that went away: the grace period frees the lock
                os.ftruncate(self._file, 0)
                if kind is not None:
                    self._remove_what_stayed_empty()
        self._close()

    def check(self) -> None:
        """Raises `LockedError` if another process has taken the lock, for which this one must have stood still."""
        if self._is_lost.is_set() or self._is_taken():
            if not self._read_holder().pid:
                raise LockedError(
                    f"{self.path} was removed or emptied while {self._me} wrote there: another process may do so by "
                    "now, and nothing more is written; run the command again to go on from the last checkpoint"
                )
            raise LockedError(
                f"{self.folder} was taken over by {self._read_holder()}, because this process had not been heard of "
                f"for {self._timing.grace_s:g} s; nothing more is written there"
            )

    def _remove_what_stayed_empty(self) -> None:
        """After a failure, removes the folders that were made for the lock if nothing was written in them."""
        if not self._made or [path.name for path in self.folder.iterdir()] != [self.path.name]:
            return
        self.path.unlink()
        for folder in self._made:
            folder.rmdir()

    def _open(self, attempts: int = 10) -> int:
        self._made = [
            folder for folder in (self.folder, *self.folder.parents) if not folder.exists()
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # O_NONBLOCK: opening a named pipe must not wait for its other end.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(self.path, flags, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts > 1:
                return self._open(
                    attempts - 1
                )  # another process, which failed, has just removed the folder
            raise LockedError(
                f"{self.folder} cannot be locked for writing ({error.strerror}: {self.path}); make it writable, or "
                "choose another folder"
            ) from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise LockedError(f"{self.path} is no ordinary file; remove it")
        return file

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # which also ends the flock
            self._file = -1

    def _acquire(self) -> None:
        """Takes the lock, or raises `LockedError`."""
        is_told = False
        while True:
            has_flock = self._flock()
            if has_flock and not self._is_there():
                self._close()
                self._file = self._open()
                continue
            if has_flock is not False and self._is_free(has_flock is True):
                break
            holder = self._read_holder()
            if not self._waits:
                raise HeldError(
                    f"{self.folder} is being written by {holder}; wait for its end, stop it, or choose another folder"
                )
            if not is_told:
                log.info("waiting for %s, which writes %s", holder, self.folder)
                is_told = True
            time.sleep(self._timing.poll_s)
        self._me = Holder(
            pid=os.getpid(),
            host=socket.gethostname(),
            boot=_boot_id(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            does=self._does,
            nonce=uuid.uuid4().hex,
        )
        self._write()
        if has_flock is None:
            self._confirm()

    def _flock(self) -> bool | None:
        """Whether this process has the `flock` now; None where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in NO_FLOCK:
                return None
            raise LockedError(
                f"{self.path} cannot be locked ({error.strerror}); choose another folder"
            ) from error
        return True

    def _is_there(self) -> bool:
        """Whether the file that is locked still has its name: the last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return False

    def _is_free(self, has_flock: bool) -> bool:
        """Whether the record's holder has released the lock or is dead."""
        seen = self._read()
        if not seen:
            return True
        holder = _parse(seen)
        if has_flock and holder.boot == _boot_id():
            return True  # the kernel of this machine released it: its process is dead
        log.info(
            "%s: watching for %g s whether %s still writes it",
            self.folder,
            self._timing.grace_s,
            holder,
        )
        end = time.monotonic() + self._timing.grace_s
        while time.monotonic() < end:
            time.sleep(self._timing.poll_s)
            now = self._read()
            if not now:
                return True
            if now != seen:
                return False
        log.warning(
            "%s: %s is gone without releasing its lock; it is taken over", self.folder, holder
        )
        return True

    def _confirm(self) -> None:
        """Without `flock` two processes may both have written the record: the one whose record stays has the lock."""
        time.sleep(2 * self._timing.poll_s)
        holder = self._read_holder()
        if holder.nonce != self._me.nonce:
            raise HeldError(
                f"{self.folder} is being written by {holder}, which started at the same time; choose another folder"
            )

    def _beat_on(self) -> None:
        while not self._is_over.wait(self._timing.beat_s):
            try:
                if self._is_taken():
                    self._is_lost.set()
                    log.error("%s was taken over by %s", self.folder, self._read_holder())
                    return
                self._write()
            except (
                OSError
            ) as error:  # the disk may be full or away for a moment: the next beat tries again
                log.debug("%s: a beat was not written (%s)", self.path, error)

    def _is_taken(self) -> bool:
        """Whether the record is another's, or was released or removed by another; not if it cannot be read just now."""
        try:
            record = self._read_now()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        holder = _parse(record)
        return not record or (holder.pid != 0 and holder.nonce != self._me.nonce)

    def _write(self) -> None:
        """Renews the record; in one call, so that a reader sees the old one or the new one."""
        self._beats += 1
        record = json.dumps(dataclasses.asdict(self._me) | {"beat": self._beats}).encode()
        os.pwrite(self._file, record, 0)
        os.ftruncate(self._file, len(record))
        os.fsync(self._file)  # other machines see it

    def _read(self) -> bytes:
        """The record as it is now, empty if it cannot be read."""
        try:
            return self._read_now()
        except OSError:
            return b""

    def _read_now(self) -> bytes:
        """The record; opened again, which is when network file systems look for changes."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.pread(file, MAX_RECORD_BYTES, 0)
        finally:
            os.close(file)

    def _read_holder(self) -> Holder:
        return _parse(self._read())


def check_held(path: str | Path) -> None:
    """Raises `LockedError` if a lock of this process on a path, or on a folder above it, was taken over by another.

    Who writes asks before: a process that was suspended for long finds that it does not have its
    folder any more. It may have no lock there; it must not have lost one.
    """
    wanted = Path(path).absolute()
    for lock in list(_held):
        folder = lock.folder.absolute()
        if wanted == folder or folder in wanted.parents:
            lock.check()


def _parse(record: bytes) -> Holder:
    """The holder that a record names; an unknown one if it is torn or was not written by moejax."""
    try:
        values: dict[str, Any] = json.loads(record.decode())
        kinds = {field.name: type(field.default) for field in dataclasses.fields(Holder)}
        known = {name: values[name] for name, kind in kinds.items() if type(values[name]) is kind}
        return Holder(**known)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder()


def _boot_id() -> str:
    """Identifies this machine since its start; where the system does not say, its network address and name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x} {socket.gethostname()}"


_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child shares the parent's `flock`, and would hold it after the parent's death."""
    for lock in list(_held):
        lock._close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
