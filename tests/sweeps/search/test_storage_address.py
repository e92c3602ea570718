"""Addresses of storages: nothing of a password is shown, and any name of a file can be opened."""

import logging
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.cli import main
from moejax.cli.sweep.search import shown_command
from moejax.sweeps import choice
from moejax.sweeps.search.definition import Definition, StudyError, search_axes
from moejax.sweeps.search.storage_address import (
    is_path,
    journal_path,
    show_storage,
    sqlite_path,
    without_secrets,
)
from moejax.sweeps.search.study import create_study, dashboard_command, open_study, serve_dashboard

SECRET = "Tr0ub4dor"
FORMS = (
    "{d}://u:{s}@h/d", "{d}://u:{s}@h:5432/d?sslmode=require", "{d}:/u:{s}@h", "{d}:u:{s}@h/d",
    "{d}//u:{s}@h/d", "//u:{s}@h/d", "u:{s}@h/d", "u:{s}@h", "{d}://u:p@{s}@h/d",
    "{d}://u:{s}@p@h/d", "{d}://u:p/{s}@h/d", "{d}://u/x:{s}@h/d", "{d}://u:{s}", "{d}://u:{s}/d",
    "{d}://u:{s}@", "{d}://:{s}@h/d", "{d}://u:{s}@h:port/d", "{d}://h/d?password={s}",
    "{d}://h/d?dsn=host=h password={s}", "{d}://h/d?dsn={s}", "{d}://h/d?sslkey={s}&a=b",
    "{d}://h/d;password={s}", "{d}://h/d?a={s}&a={s}", "{d}://h/d#{s}@x", "{d}://u:%54{s}@h/d",
    "{d}://h?{s}=1&pw {s}=2", "{d}:///?odbc_connect=DRIVER=x;UID=u;PWD={s}",
    "{d}:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{s}", "{d}://u:{s}@[::1]/d", "{d}://u:{s}@h,k:1/d",
    "{d} ://u:{s}@h/d", " {d}://u:{s}@h/d", "{d}://u:p:{s}@h/d", "{d}://u:{s}@h/d.db",
    "{d}:/u:{s}@h/d.journal", "u:{s}@h/d.db", "//u:{s}@h/d.log", "{d}://u:{s}@h/{{x}}",
    "{d}://u :{s} @h/d", "{d}:{s}",
)  # fmt: skip
DIALECTS = (
    "postgresql+psycopg", "postgresql", "mysql+pymysql", "mssql+pyodbc", "sqlite", "oracle",
    "nosuch", "x+y.z",
)  # fmt: skip


def addresses():
    endings = st.text("abcXYZ019%+~!$^*()|<>", min_size=5, max_size=12)
    return st.builds(fill_form, st.sampled_from(FORMS), st.sampled_from(DIALECTS), endings)


def fill_form(form, dialect, ending):
    return form.format(d=dialect, s=f"{SECRET}{ending}")


@settings(deadline=None)
@given(addresses())
def test_no_part_of_an_address_that_may_hold_a_password_is_shown(address):
    assert SECRET not in show_storage(address)
    command = ["sweep", f"--storage={address}", "-storage", address, address]
    assert SECRET not in shown_command(command)
    message = f'invalid port "{address}"; could not resolve {address.split("@")[-1]}'
    assert SECRET not in without_secrets(message, address)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", DIALECTS[:3])
def test_no_error_about_a_storage_holds_its_password(
    form, dialect, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    address = form.format(d=dialect, s=SECRET)
    if "@h" not in address or "postgresql" not in dialect:  # whose driver would look for a host
        for attempt in (open_study, lambda storage, name: serve_dashboard(storage)):
            with pytest.raises(StudyError) as caught:
                attempt(address, "s")
            assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert main(["sweep", "worker", address]) == 2
    assert main(["sweep", address]) == 2 and main(["sweep", "dashboard", address]) == 2
    assert main(["sweep", "worker", f"--storage={address}", "--study=s", "--trials=3"]) == 2
    assert main(["sweep", "worker", f"--storage={address}", "--storage", f"{address}x"]) == 2
    assert main(["sweep", "worker", f"--strage={address}"]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.err + said.out + caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_harmless_parts_of_an_address_are_shown():
    shown = {
        "runs/a b.db": "runs/a b.db",
        "runs/p@1/study.journal": "runs/p@1/study.journal",
        "postgresql+psycopg://some:pw@host:5432/d_b?sslmode=x": (
            "postgresql+psycopg://some:***@host:5432/d_b?***"
        ),
        "mysql+pymysql://host/d": "mysql+pymysql://host/d",
        "postgresql+psycopg://u:pw@[::1]:5/d": "postgresql+psycopg://u:***@::1:5/d",
        "sqlite:////runs/a%20b.db": "sqlite:////runs/a b.db",
        "postgresql:/u:pw@h": "postgresql:***",
        "u:pw@h": "***",
    }
    assert {address: show_storage(address) for address in shown} == shown


@pytest.fixture
def definition():
    axes = search_axes([choice("moe.top_k", 1, 2)])
    return Definition("r.py", {}, axes, "random", "none", 0, 2, (1.0,), False)


@pytest.mark.parametrize(
    "name", ["p%20q", "q?m", "a#b", "a b", "p%2Fq", "{x}", "ünï", "a&b=c", "a+b", "a;b"]
)
@pytest.mark.parametrize("ending", [".db", ".journal"])
def test_a_storage_is_the_named_file_whatever_its_name(name, ending, definition, tmp_path):
    storage = tmp_path / name / f"study{ending}"
    create_study(str(storage), "s", definition)
    assert storage.is_file() and [path.name for path in tmp_path.iterdir()] == [name]
    assert open_study(str(storage), "s").study_name == "s"  # as a worker joins
    if ending == ".db":
        _, address, *_ = shlex.split(dashboard_command(str(storage)))
        assert sqlite_path(address) == storage and open_study(address, "s").study_name == "s"


def test_paths_and_addresses_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sqlite_path("a.db") == tmp_path / "a.db" and journal_path("a.log") == tmp_path / "a.log"
    assert sqlite_path("sqlite:///a.db") == tmp_path / "a.db" and sqlite_path("sqlite://") is None
    assert journal_path("sqlite:///a.journal") is None
    assert not is_path("sqlite:///a.db") and is_path("./u:p/a.db")


def test_a_dashboard_without_a_study_is_refused_and_makes_nothing(
    definition, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("optuna_dashboard.run_server", lambda *_, **__: pytest.fail("it is served"))
    empty = tmp_path / "empty.journal"
    empty.touch()
    missing = [tmp_path / "a.journal", tmp_path / "sub/a.db", f"sqlite:///{tmp_path}/b.db"]
    for storage in [*missing, empty]:
        assert main(["sweep", "dashboard", f"--storage={storage}"]) == 2
        error = capsys.readouterr().err
        assert "there is no study in" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty.journal"]
    assert empty.read_bytes() == b""
    monkeypatch.setattr("optuna_dashboard.run_server", lambda *_, **__: None)
    create_study(str(tmp_path / "c.db"), "s", definition)
    assert main(["sweep", "dashboard", f"--storage={tmp_path / 'c.db'}"]) == 0


def test_a_damaged_journal_is_one_line_that_names_it(definition, tmp_path):
    path = tmp_path / "study.journal"
    create_study(str(path), "s", definition)
    content = path.read_bytes()
    nested_deeply = b"[" * 100_000
    unknown_operation = b'{"op_code": 99, "worker_id": "a"}\n'
    before_it = [b"x\n" + content, b"[1]\n" + content]
    for damaged in [*before_it, b"3\n", unknown_operation, nested_deeply, b"\xff\n"]:
        path.write_bytes(damaged + b"\n")
        with pytest.raises(StudyError) as caught:
            open_study(str(path), "s")
        assert "study.journal is no journal of Optuna, or damaged" in str(caught.value)
        assert "\n" not in str(caught.value)
