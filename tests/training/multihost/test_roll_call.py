"""The roll call names to all processes which is missing, comes twice or runs something else."""

import json
import socket
import threading

import pytest

from moejax.training.multihost import roll_call
from moejax.training.multihost.roll_call import RollCallError, call_roll


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch):
    """What a process runs; a thread may change its own."""
    own = threading.local()
    monkeypatch.setattr(
        roll_call, "what_runs", lambda: {"moejax": "1", "jax": getattr(own, "jax", "0.10")}
    )
    monkeypatch.setattr(roll_call, "RETRY_S", 0.02)
    roll_call.of_this_thread = own
    yield
    del roll_call.of_this_thread


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def call_in_threads(*processes, wait_s=20.0, port=None):
    """Calls the roll in one thread for each (number, of how many, version of jax).

    Returns what each got as an answer: "begin", or what is wrong.
    """
    port = port or free_port()
    answers = [None] * len(processes)

    def run(place, number, of, jax="0.10"):
        roll_call.of_this_thread.jax = jax
        try:
            links = call_roll(f"127.0.0.1:{port}", of, number, wait_s)
            answers[place] = "begin"
            for link in links.values():
                link.close()
        except RollCallError as error:
            answers[place] = str(error)

    threads = [
        threading.Thread(target=run, args=(place, *process))
        for place, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_processes_that_are_all_there_and_run_the_same_begin():
    assert call_in_threads((0, 3), (1, 3), (2, 3)) == ["begin"] * 3
    assert call_in_threads((0, 1)) == ["begin"]


def test_a_missing_process_is_named_to_all_others():
    answers = call_in_threads((0, 4), (2, 4), wait_s=1.0)
    assert answers[0] == answers[1]
    assert (
        "processes 1, 3 of 4 did not come to process 0" in answers[0] and "within 1 s" in answers[0]
    )
    assert "--wait_s" in answers[0]


def test_a_missing_process_0_is_named_with_its_address_and_the_reason():
    (answer,) = call_in_threads((1, 2), wait_s=0.5)
    assert "process 0 did not answer at 127.0.0.1:" in answer
    assert "within 0.5 s" in answer and "refused" in answer


def test_a_number_that_comes_twice_is_named_to_both():
    answers = call_in_threads((0, 3), (1, 3), (1, 3), wait_s=5.0)
    assert len(set(answers)) == 1 and "process 1 on" in answers[0] and "came twice" in answers[0]


def test_numbers_of_processes_that_differ_are_named():
    answers = call_in_threads((0, 2), (1, 3))
    assert len(set(answers)) == 1 and "--num_processes=3" in answers[0] and "with 2" in answers[0]


def test_another_version_is_named_with_both():
    answers = call_in_threads((0, 2), (1, 2, "0.12"))
    assert len(set(answers)) == 1 and "process 1 on" in answers[0]
    assert "runs jax 0.12" in answers[0] and "runs 0.10" in answers[0]


def test_a_port_that_another_program_uses_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RollCallError, match=f"cannot listen at port {port} .*in use"):
            call_roll(f"127.0.0.1:{port}", 2, 0, 5.0)


def test_a_host_that_no_one_knows_is_named():
    with pytest.raises(
        RollCallError, match=r"process 0 did not answer at no-such-host\.invalid:8476 within 0\.3 s"
    ):
        call_roll("no-such-host.invalid:8476", 2, 1, 0.3)


def test_a_stranger_at_the_port_disturbs_nothing(monkeypatch):
    port = free_port()
    strangers = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 9000 + b"\n",
        b"\n",
        json.dumps({"process": "x"}).encode() + b"\n",
    ]

    def visit():
        for words in strangers:
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                        connection.sendall(words)
                        break
                except ConnectionRefusedError:
                    pass

    monkeypatch.setattr(roll_call, "ANSWER_S", 0.5)
    visitor = threading.Thread(target=visit)
    visitor.start()
    answers = []
    first = threading.Thread(
        target=lambda: answers.extend(call_in_threads((0, 2), wait_s=20.0, port=port))
    )
    first.start()
    visitor.join()
    answers_of_second = call_in_threads((1, 2), port=port)
    first.join()
    assert answers + answers_of_second == ["begin", "begin"]


def test_what_must_be_equal_covers_the_code_versions_and_settings(monkeypatch):
    monkeypatch.undo()
    runs = roll_call.what_runs()
    assert {
        "moejax",
        "jax",
        "jaxlib",
        "numpy",
        "jax_threefry_partitionable",
        "jax_enable_x64",
    } <= runs.keys()
    assert "files " in runs["moejax"]
