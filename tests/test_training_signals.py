"""Stopping: the first signal is remembered, repeated ones do no harm."""

import os
import signal

import pytest

from moejax.training import signals
from moejax.training.signals import StopSignals


def test_the_first_signal_is_remembered_and_later_sigterms_change_nothing():
    with StopSignals() as stop:
        assert not stop
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop and stop.received == "SIGTERM"


def test_a_signal_is_known_also_where_another_reason_was_the_first(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
    with StopSignals() as stop:
        stop.request("ALARM")
        assert (stop.received, stop.signal) == ("ALARM", None)
        os.kill(os.getpid(), signal.SIGINT)  # the first: no interruption
        assert (stop.received, stop.signal) == ("ALARM", "SIGINT")


def test_a_second_sigint_after_a_while_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
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
