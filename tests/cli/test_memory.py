"""Too little memory: one line that says where and what to do."""

import resource

import jax
import pytest

from moejax import cli
from moejax.cli import main
from moejax.cli.memory import warn_of_small_limit
from moejax.training.run_directory.routing_store import RoutingLogError


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError("std::bad_alloc"), "the host (std::bad_alloc)"),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"
            ),
            "a device (RES",
        ),
    ],
)
def test_an_allocation_that_fails_is_one_line_with_a_remedy(error, where, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(cli, "_run_verb", fails)
    assert main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moejax: there is no more memory on {where}")
    assert "train.batch_size" in line
    with pytest.raises(type(error)):
        main(["train", "--debug"])


def test_a_full_disk_is_not_called_a_full_device(monkeypatch, capsys):
    def fails(*_):
        raise RoutingLogError(
            "r cannot be written (RESOURCE_EXHAUSTED: No space left on device); make room there"
        )

    monkeypatch.setattr(cli, "_run_verb", fails)
    assert main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moejax: r cannot be written") and "train.batch_size" not in line


def test_an_error_of_another_kind_keeps_its_traceback(monkeypatch):
    def fails(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(cli, "_run_verb", fails)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["train"])


def test_a_small_limit_of_address_space_is_logged_and_no_limit_is_not(monkeypatch, caplog):
    for soft, is_said in [(10**9, True), (resource.RLIM_INFINITY, False), (10**12, False)]:
        caplog.clear()
        limits = (soft, resource.RLIM_INFINITY)
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        warn_of_small_limit()
        assert ("1.0 GB of address space (ulimit -v 976562)" in caplog.text) == is_said
        assert bool(caplog.text) == is_said
