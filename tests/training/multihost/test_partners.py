"""The end of a process is reported once in each of the others, unless it is expected."""

import socket
import time

import pytest

from moejax.training.multihost.partners import Partners


@pytest.fixture
def three():
    """Process 0 with connections to 1 and 2, and these two."""
    first, one = socket.socketpair()
    other_first, two = socket.socketpair()
    partners = [
        Partners({"process 1 on a": first, "process 2 on b": other_first}),
        Partners({"process 0": one}),
        Partners({"process 0": two}),
    ]
    yield partners
    for each in partners:
        if each._thread.is_alive():
            each.leave("done")


def die(partners):
    """What the kernel does for a process that was killed, which itself sends nothing any more."""
    partners.expect_their_end()
    partners._send = lambda *_: None
    for link in partners._links.values():
        link.shutdown(socket.SHUT_RDWR)


def lines(capfd):
    return capfd.readouterr().err.splitlines()


def test_the_death_of_one_process_is_reported_to_all_others_by_name(three, capfd):
    die(three[2])
    for partners in three[:2]:
        assert partners.has_reported.wait(10)
    reported = lines(capfd)
    beginning = "moejax: process 2 on b has ended or cannot be reached"
    assert sum(line.startswith(beginning) for line in reported) == 2
    assert sum("continues from the newest checkpoint" in line for line in reported) == 2


def test_the_death_of_process_0_is_reported_by_each_of_the_others(three, capfd):
    die(three[0])
    for partners in three[1:]:
        assert partners.has_reported.wait(10)
    assert sum(line.startswith("moejax: process 0 has ended") for line in lines(capfd)) == 2


def test_a_report_of_a_failed_process_refers_to_its_own_output(three, capfd):
    three[1].leave("failed")
    for partners in (three[0], three[2]):
        assert partners.has_reported.wait(10)
    beginning = "moejax: process 1 on a failed; its own"
    assert sum(line.startswith(beginning) for line in lines(capfd)) == 2


def test_processes_that_are_done_leave_without_a_report(three, capfd):
    for partners in three:
        partners.leave("done")
    assert lines(capfd) == []
    assert not any(partners.has_reported.is_set() for partners in three)


def test_an_end_that_all_expect_is_not_reported(three, capfd):
    for partners in three:
        partners.expect_their_end()
    die(three[1])
    time.sleep(0.2)
    assert lines(capfd) == []


def test_only_the_first_that_ends_is_named(three, capfd):
    die(three[1])
    assert three[0].has_reported.wait(10)
    die(three[2])
    time.sleep(0.2)
    assert not any("process 2" in line for line in lines(capfd))
