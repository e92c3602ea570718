"""Folders with one writer: what a second one learns and what the holder's death releases.

And how locks work on shared file systems.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moejax import locks
from moejax.locks import FolderLock, LockedError, Timing, check_held

QUICK = Timing(beat_s=0.05, grace_s=0.4, poll_s=0.02)

HOLD = """
import sys, time
from moejax.locks import FolderLock
with FolderLock(sys.argv[1], "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    environment = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def foreign_record(folder, beat=1):
    """What a process of another machine would have written."""
    record = {
        "pid": 7,
        "host": "node9",
        "boot": "b",
        "since": "then",
        "does": "train",
        "nonce": "n",
        "beat": beat,
    }
    (folder / ".lock").write_text(json.dumps(record))


def test_a_second_process_learns_who_writes_the_folder(tmp_path, other):
    with pytest.raises(LockedError) as caught, FolderLock(tmp_path, "train"):
        pass
    message = str(caught.value)
    time_pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    pattern = rf"process {other.pid} on \S+ \(train, since {time_pattern}\)"
    assert re.search(pattern, message), message
    assert str(tmp_path) in message and "\n" not in message


def test_the_death_of_the_holder_releases_the_lock_at_once(tmp_path, other, caplog):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with caplog.at_level("INFO", "moejax"), FolderLock(tmp_path, "train") as lock:
        lock.check()
    assert "watching" not in caplog.text


def test_the_end_of_the_holder_releases_the_lock_and_leaves_no_record(tmp_path):
    for _ in range(2):
        with FolderLock(tmp_path, "train"):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / ".lock").read_bytes() == b""


def test_one_process_does_not_write_a_folder_twice_at_once(tmp_path):
    with FolderLock(tmp_path, "train"):
        with (
            pytest.raises(LockedError, match=f"process {os.getpid()} "),
            FolderLock(tmp_path, "report"),
        ):
            pass
        # The refused one released nothing.
        with pytest.raises(LockedError), FolderLock(tmp_path, "report"):
            pass


def test_a_process_that_waits_goes_on_when_the_holder_dies(tmp_path, other, caplog):
    started = time.monotonic()
    with caplog.at_level("INFO", "moejax"):
        threading.Timer(0.3, other.kill).start()
        with FolderLock(tmp_path, "prepare", waits=True, timing=QUICK):
            assert time.monotonic() - started >= 0.3
    waiting = [message for message in caplog.messages if "waiting for" in message]
    assert len(waiting) == 1 and f"process {other.pid} " in waiting[0]


def test_a_record_of_another_machine_that_does_not_change_is_taken_over(tmp_path, caplog):
    foreign_record(tmp_path)
    started = time.monotonic()
    with FolderLock(tmp_path, "train", timing=QUICK) as lock:
        assert time.monotonic() - started >= QUICK.grace_s
        lock.check()
    assert "process 7 on node9 (train, since then) is gone" in caplog.text


def test_a_record_of_another_machine_with_heartbeats_is_respected(tmp_path):
    foreign_record(tmp_path)
    heartbeat = threading.Timer(0.1, foreign_record, (tmp_path, 2))
    heartbeat.start()
    with pytest.raises(LockedError, match=r"process 7 on node9 \(train, since then\)"):
        FolderLock(tmp_path, "train", timing=QUICK).__enter__()
    heartbeat.join()


def test_without_flock_the_record_alone_decides(tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", no_flock)
    is_refused = pytest.raises(LockedError, match=f"process {os.getpid()} ")
    with FolderLock(tmp_path, "train", timing=QUICK), is_refused:
        FolderLock(tmp_path, "train", timing=QUICK).__enter__()
    with FolderLock(tmp_path, "train", timing=QUICK):  # released: nothing to wait for
        pass


def test_a_holder_that_lost_its_lock_learns_it_and_leaves_the_record(tmp_path):
    with FolderLock(tmp_path, "train", timing=QUICK) as lock:
        foreign_record(tmp_path)
        deadline = time.monotonic() + 10
        while not lock._is_lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LockedError, match="taken over by process 7 on node9"):
            lock.check()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 7


def test_a_lock_on_a_full_disk_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        locks.os, "pwrite", raises(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(
        LockedError,
        match=r"run/\.lock cannot be written \(No space left on device\); make room there",
    ):
        FolderLock(tmp_path / "run", "train").__enter__()


SLOW = Timing(beat_s=60, grace_s=0.4, poll_s=0.02)


def test_a_writer_that_asks_learns_of_a_takeover_at_once(tmp_path):
    check_held(tmp_path / "run/metrics.jsonl")  # no process holds it
    with FolderLock(tmp_path / "run", "train", timing=SLOW):
        check_held(tmp_path / "run/metrics.jsonl")
        foreign_record(tmp_path / "run")
        for path in ("run", "run/metrics.jsonl", "run/checkpoints"):
            with pytest.raises(LockedError, match="run was taken over by process 7 on node9"):
                check_held(tmp_path / path)
        check_held(tmp_path)
        check_held(tmp_path / "running")
    assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == 7  # left as it is
    check_held(tmp_path / "run")


@pytest.mark.parametrize("record", [b"", None], ids=["released", "removed"])
def test_a_record_that_another_has_released_or_removed_is_lost(tmp_path, record):
    with FolderLock(tmp_path, "train", timing=SLOW):
        if record is None:
            (tmp_path / ".lock").unlink()
        else:
            (tmp_path / ".lock").write_bytes(record)
        with pytest.raises(
            LockedError, match=rf"\.lock was removed or emptied while process {os.getpid()} "
        ):
            check_held(tmp_path)


def test_a_lock_is_not_lost_while_its_record_cannot_be_read(tmp_path, monkeypatch):
    with FolderLock(tmp_path, "train", timing=QUICK) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(locks.os, "open", raises(OSError(errno.ESTALE, "Stale file handle")))
            check_held(tmp_path)
            time.sleep(4 * QUICK.beat_s)
        # A torn record. One call makes it: rewriting the file would empty it first, as if released.
        os.truncate(tmp_path / ".lock", 14)
        check_held(tmp_path)
        # The next heartbeat writes it again.
        wait_for(lambda: b"nonce" in (tmp_path / ".lock").read_bytes())
        assert not lock._is_lost.is_set()


def raises(error):
    def function(*_):
        raise error

    return function


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_before_anything_was_written_leaves_no_folder(tmp_path):
    folder = tmp_path / "runs" / "debug"
    (tmp_path / "mine").mkdir()
    for path in (folder, tmp_path / "mine"):
        with pytest.raises(RuntimeError), FolderLock(path, "train"):
            assert (path / ".lock").exists()
            raise RuntimeError("before anything was written")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(RuntimeError), FolderLock(folder, "train"):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("afterwards")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.json"]


def test_a_process_that_waited_for_a_removed_lock_holds_a_new_one(tmp_path):
    folder = tmp_path / "run"
    first = FolderLock(folder, "train")
    first.__enter__()
    threading.Timer(0.2, first.__exit__, (RuntimeError, None, None)).start()
    with FolderLock(folder, "prepare", waits=True, timing=QUICK):
        assert json.loads((folder / ".lock").read_text())["does"] == "prepare"
        with pytest.raises(LockedError), FolderLock(folder, "train"):
            pass


@pytest.mark.parametrize("record", ["{", "[]", '{"pid": "x"}', "[" * 4000, "\x00\xff"])
def test_a_damaged_record_neither_blocks_nor_raises(tmp_path, record):
    (tmp_path / ".lock").write_bytes(record.encode("latin-1"))
    with FolderLock(tmp_path, "train", timing=QUICK) as lock:
        lock.check()


def test_a_lock_that_is_a_link_or_a_pipe_is_refused_in_a_line(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "target")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / ".lock")
    (tmp_path / "c").write_text("a file")
    with (
        pytest.raises(LockedError, match="/proc/nowhere cannot be locked"),
        FolderLock("/proc/nowhere", "train"),
    ):
        pass
    for name in "abc":
        with (
            pytest.raises(LockedError, match=str(tmp_path / name)),
            FolderLock(tmp_path / name, "train"),
        ):
            pass
    assert (tmp_path / "target").read_text() == "kept"


def test_a_forked_child_does_not_hold_the_lock_of_a_dead_parent(tmp_path):
    fork = 'import os; child = os.fork(); os.write(1, b"%d\\n" % child)'
    code = HOLD.replace('print("held", flush=True)', fork)
    environment = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    # The parent prints the child's id, and the child prints 0.
    child = max(int(process.stdout.readline()) for _ in range(2))
    try:
        process.kill()
        process.wait()
        with FolderLock(tmp_path, "train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
