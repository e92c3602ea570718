"""Locks for folders with one writer: each says who holds it, and the holder's death releases it.

Two mechanisms work together, because neither is enough alone:

- `flock` on `FOLDER/.lock`. The kernel releases it when the process ends, however it ends. Some
  shared file systems do not have it, and some keep it within one machine.
- A record in that file: who holds the lock, and a heartbeat, a number that the holder raises every
  few seconds. Where `flock` cannot decide, a second process watches the record by its own clock:
  clocks of two machines are never compared. A record that has not changed for the grace period
  belongs to a process that is gone.

A lock in object storage would hold the same record, created and renewed by conditional writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import stat
import threading
import time
import weakref
from pathlib import Path

from moejax.lock_record import Holder, boot_id, parse_holder, this_process

__all__ = ["FolderLock", "HeldError", "LockedError", "check_held"]

BEAT_S = 5.0
"""Seconds between two heartbeats of a holder."""

GRACE_S = 30.0
"""Seconds that an observer sees a record unchanged before it takes the holder for dead."""

POLL_S = 0.5
"""Seconds between two attempts to take a lock that another process holds."""

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors by which file systems say that they have no `flock`."""

MAX_RECORD_BYTES = 4096

log = logging.getLogger("moejax")


class LockedError(ValueError):
    """A folder that another process writes, or that cannot be locked.

    The message says who writes it, since when, and what to do.
    """


class HeldError(LockedError):
    """A folder that another process writes: a caller that can do without it may go on."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The intervals of a lock, in seconds; tests shorten them.

    Attributes:
      beat_s: between two heartbeats of the holder.
      grace_s: without a heartbeat, after which the holder counts as dead.
      poll_s: between two attempts of a process that waits.
    """

    beat_s: float = BEAT_S
    grace_s: float = GRACE_S
    poll_s: float = POLL_S


class FolderLock:
    """A context in which this process alone writes a folder.

    Args:
      folder: what is locked; created if it is missing.
      does: what this process does there, for the message that others get: "train", "sweep worker".
      waits: whether to wait until the holder ends, and say once who that is; otherwise a held lock
        is an error.
      timing: the intervals.

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
        self._file = -1  # a file descriptor; -1 for none
        self._made: list[Path] = []  # folders, the innermost first
        self._num_beats = 0
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
                    f"{self.path} cannot be written ({error.strerror}); "
                    "make room there, or choose another folder"
                ) from error
            raise
        self._thread = threading.Thread(
            target=self._keep_beating, name=f"lock of {self.folder}", daemon=True
        )
        self._thread.start()
        _held_locks.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _held_locks.discard(self)
        self._is_over.set()
        if self._thread:
            self._thread.join()
        if self._file >= 0 and not self._has_lost():
            # If the disk went away, the grace period frees the lock.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
                if kind is not None:
                    self._remove_empty_folders()
        self._close()

    def check(self) -> None:
        """Raises `LockedError` if another process has taken the lock.

        That happens only to a process that was suspended for longer than the grace period.
        """
        if not self._has_lost():
            return
        if not self._read_holder().pid:
            raise LockedError(
                f"{self.path} was removed or emptied while {self._me} wrote there: "
                "another process may do so by now, and nothing more is written; "
                "run the command again to go on from the last checkpoint"
            )
        raise LockedError(
            f"{self.folder} was taken over by {self._read_holder()}, "
            f"because this process showed no sign of life for {self._timing.grace_s:g} s; "
            "nothing more is written there"
        )

    def _has_lost(self) -> bool:
        return self._is_lost.is_set() or self._is_taken()

    def _remove_empty_folders(self) -> None:
        """Removes the folders that were made for the lock, if nothing else is in them."""
        if not self._made:
            return
        if [path.name for path in self.folder.iterdir()] != [self.path.name]:
            return
        self.path.unlink()
        for folder in self._made:
            folder.rmdir()

    def _open(self, attempts: int = 10) -> int:
        """Opens the lock's file, which it makes if need be, and returns the descriptor."""
        folders = (self.folder, *self.folder.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # O_NONBLOCK: opening a named pipe must not wait for its other end.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(self.path, flags, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts > 1:
                # Another process, which failed, has just removed the folder.
                return self._open(attempts - 1)
            raise LockedError(
                f"{self.folder} cannot be locked for writing ({error.strerror}: {self.path}); "
                "make it writable, or choose another folder"
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
        has_flock = self._wait_until_free()
        self._me = this_process(self._does)
        self._write()
        if has_flock is None:
            self._confirm()

    def _wait_until_free(self) -> bool | None:
        """Waits until the lock is free, if it may; otherwise raises `HeldError`.

        Returns:
          Whether this process has the `flock`; None where the file system has none.
        """
        is_logged = False
        while True:
            has_flock = self._flock()
            if has_flock and not self._is_still_there():
                self._close()
                self._file = self._open()
                continue
            if has_flock is not False and self._is_free(has_flock is True):
                return has_flock
            holder = self._read_holder()
            if not self._waits:
                raise HeldError(
                    f"{self.folder} is being written by {holder}; "
                    "wait for its end, stop it, or choose another folder"
                )
            if not is_logged:
                log.info("waiting for %s, which writes %s", holder, self.folder)
                is_logged = True
            time.sleep(self._timing.poll_s)

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

    def _is_still_there(self) -> bool:
        """Whether the locked file still has its name: the last holder may have removed it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return False

    def _is_free(self, has_flock: bool) -> bool:
        """Whether the record's holder has released the lock or is dead."""
        record = self._read()
        if not record:
            return True
        holder = parse_holder(record)
        if has_flock and holder.boot == boot_id():
            return True  # the kernel of this machine released it: its process is dead
        grace_s = self._timing.grace_s
        log.info("%s: watching for %g s whether %s still writes it", self.folder, grace_s, holder)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            time.sleep(self._timing.poll_s)
            now = self._read()
            if not now:
                return True
            if now != record:
                return False
        log.warning(
            "%s: %s is gone without releasing its lock; it is taken over", self.folder, holder
        )
        return True

    def _confirm(self) -> None:
        """Raises `HeldError` if another process has written its record over this one's.

        Without `flock` two processes may both find the lock free and write their records; the one
        whose record stays has the lock.
        """
        time.sleep(2 * self._timing.poll_s)
        holder = self._read_holder()
        if holder.nonce != self._me.nonce:
            raise HeldError(
                f"{self.folder} is being written by {holder}, which started at the same time; "
                "choose another folder"
            )

    def _keep_beating(self) -> None:
        """Renews the record until the context ends or the lock is lost; runs in a thread."""
        while not self._is_over.wait(self._timing.beat_s):
            try:
                if self._is_taken():
                    self._is_lost.set()
                    log.error("%s was taken over by %s", self.folder, self._read_holder())
                    return
                self._write()
            # The disk may be full or away for a moment: the next heartbeat tries again.
            except OSError as error:
                log.debug("%s: a heartbeat was not written (%s)", self.path, error)

    def _is_taken(self) -> bool:
        """Whether the record is another process's, or was released or removed by another.

        A record that cannot be read at the moment, or is torn, is not taken.
        """
        try:
            record = self._read_now()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        if not record:
            return True
        holder = parse_holder(record)
        return holder.pid != 0 and holder.nonce != self._me.nonce

    def _write(self) -> None:
        """Renews the record; in one call, so that a reader sees the old one or the new one."""
        self._num_beats += 1
        values = dataclasses.asdict(self._me) | {"beat": self._num_beats}
        record = json.dumps(values).encode()
        os.pwrite(self._file, record, 0)
        os.ftruncate(self._file, len(record))
        os.fsync(self._file)  # so that other machines see it

    def _read(self) -> bytes:
        """Returns the record as it is now, empty if it cannot be read."""
        try:
            return self._read_now()
        except OSError:
            return b""

    def _read_now(self) -> bytes:
        """Returns the record.

        The file is opened again, because network file systems look for changes only then.
        """
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.pread(file, MAX_RECORD_BYTES, 0)
        finally:
            os.close(file)

    def _read_holder(self) -> Holder:
        return parse_holder(self._read())


def check_held(path: str | Path) -> None:
    """Raises `LockedError` if this process has lost a lock on `path` or on a folder above it.

    To be called before writing: a process that was suspended for long finds out here that another
    one has its folder. A process that never had a lock may write; one that lost its lock may not.
    """
    wanted = Path(path).absolute()
    for lock in list(_held_locks):
        folder = lock.folder.absolute()
        if wanted == folder or folder in wanted.parents:
            lock.check()


_held_locks: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    """Closes the locks' files in a forked child.

    It shares the parent's `flock`, and would hold it after the parent's death.
    """
    for lock in list(_held_locks):
        lock._close()
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_in_child)
