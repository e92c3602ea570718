"""Stopping: the first signal is remembered, and repeated ones do no harm."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from moejax.training.multihost import signals
from moejax.training.multihost.signals import StopSignals


def test_the_first_signal_is_remembered_and_later_sigterms_change_nothing():
    with StopSignals() as stop:
        assert not stop
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop and stop.received == "SIGTERM"


def test_a_signal_is_remembered_after_another_reason_to_stop(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.0)
    with StopSignals() as stop:
        stop.request("ALARM")
        assert (stop.received, stop.signal) == ("ALARM", None)
        os.kill(os.getpid(), signal.SIGINT)  # the first: no interruption
        assert (stop.received, stop.signal) == ("ALARM", "SIGINT")


def test_a_second_sigint_after_a_while_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_when_the_outermost_use_ends():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals()
    with stop:
        with stop:
            pass
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


COMPUTES = """
import hashlib, sys, threading
from moejax.training.multihost.signals import SignalWatch, StopSignals, uninterrupted
with SignalWatch(), StopSignals() as stop, uninterrupted("compiling a sum"):
    # Printed once the main thread computes. As in a compilation, no handler runs until it ends.
    threading.Timer(0.5, print, ("begun",), {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
    print("ended", stop.received, flush=True)
"""


def computing(iterations):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPUTES, str(iterations)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=environment,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_signal_while_compiling_is_answered_and_a_second_one_exits():
    process = computing(10**9)
    try:
        process.send_signal(signal.SIGINT)
        can_read, _, _ = select.select([process.stderr], [], [], 60)
        assert can_read, "nothing printed within a minute"
        assert process.stderr.readline() == (
            "moejax: SIGINT: compiling a sum cannot be interrupted; moejax stops after it. "
            "A second Ctrl-C leaves at once\n"
        )
        process.send_signal(signal.SIGTERM)  # schedulers repeat it: nothing is lost by it
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        assert errors == "moejax: a second SIGINT during compiling a sum: leaving at once\n"
    finally:
        process.kill()


def test_a_signal_that_a_handler_answers_at_once_prints_nothing_else():
    code = COMPUTES.replace(
        'hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))', "sys.stdin.readline()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5 * signals.GRACE_SECONDS)
    assert process.communicate("go on\n", timeout=60) == ("ended SIGTERM\n", "")


def test_the_watch_restores_the_previous_handler_and_descriptor():
    before = signal.getsignal(signal.SIGINT)
    with signals.SignalWatch():
        assert signal.getsignal(signal.SIGINT) != before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) == before
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    assert descriptor == -1
