"""Paths as users write them: made absolute where they enter, and refused if they cannot work."""

import os
import stat
from pathlib import Path

import pytest

from moejax.config import resolve
from moejax.inference.evaluate import evaluate_run
from moejax.inference.load import load_run
from moejax.inspection.report.comparison_page import write_comparison
from moejax.inspection.runs.run import open_run
from moejax.paths import (
    PathError,
    check_run_folder,
    check_writable,
    check_writable_file,
    resolve_path,
)
from moejax.sweeps.report.write import build_sweep_report
from moejax.sweeps.store.directory import open_sweep
from moejax.training.loop import train
from moejax.training.run_directory.routing_log import read_routing


def test_a_path_is_resolved_with_its_home_its_dots_and_its_links(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    monkeypatch.chdir(tmp_path / "a/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path.resolve() / "a/new"
    relative = ["../new", "../../link/../new", "./../b/../new", Path("../new")]
    for given in [*relative, "~/a/new", str(expected)]:
        assert resolve_path(given, "--workdir") == expected
    assert not expected.exists()


def compare_with_itself(path):
    return write_comparison([path, path])


def train_in(path):
    return train(resolve({}), path)


@pytest.mark.parametrize(
    "given", ["gs://b/x", "s3://b", "file:///tmp/x", Path("gs://b/x"), "a\0b", "caf\udce9"]
)
@pytest.mark.parametrize(
    "use_path",
    [
        resolve_path, open_run, load_run, evaluate_run, open_sweep, build_sweep_report,
        compare_with_itself, train_in, read_routing,
    ],
)  # fmt: skip
def test_a_path_that_cannot_work_is_refused_everywhere(given, use_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PathError, match=r"buckets are not supported|cannot be a path|is not UTF-8"):
        use_path(given)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_libraries_would_write_differently_is_refused(tmp_path, monkeypatch):
    assert resolve_path(tmp_path / "ünï") == tmp_path / "ünï"
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    with pytest.raises(
        PathError,
        match="ünï, is not UTF-8 here; use a folder with a plain name, or a locale with UTF-8",
    ):
        resolve_path(tmp_path / "ünï")
    assert resolve_path(tmp_path / "plain") == tmp_path / "plain"


def test_links_in_a_circle_and_unknown_homes_are_refused(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for given in (tmp_path / "one/x", "~nosuchuser/x"):
        with pytest.raises(PathError, match=r"cannot be a path \(.+\); name another"):
            resolve_path(given)


def test_a_folder_whose_checkpoints_could_not_be_read_is_refused(tmp_path):
    check_run_folder(tmp_path / "p(1)/a b", "--workdir")
    for name in ("p[1]/run", "run*", "what?"):
        with pytest.raises(
            PathError, match=r"--workdir=.* has [\[*?] in it, .* use a folder whose path has none"
        ):
            check_run_folder(tmp_path / name, "--workdir")


def test_what_cannot_be_written_is_found_before_anything_is_made(tmp_path, monkeypatch):
    check_writable(tmp_path / "new/er", "--workdir")
    check_writable_file(tmp_path / "new.csv", "--csv")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (Path("/dev/null/x"), tmp_path / "file/x"):
        with pytest.raises(PathError, match=r"--workdir=.* cannot be written: .* is not a folder"):
            check_writable(path, "--workdir")
    with pytest.raises(PathError, match=r"--workdir=/proc/x cannot be written: /proc: "):
        check_writable(Path("/proc/x"), "--workdir")
    for path, reason in (
        (tmp_path / "no/a.csv", "no is not a folder; make it first"),
        (Path("/dev/null"), "be a file"),
    ):
        with pytest.raises(PathError, match=reason):
            check_writable_file(path, "--csv")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PathError, match=r"--csv=.*file cannot be written: the file is read-only"):
        check_writable_file(tmp_path / "file", "--csv")
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
    assert (tmp_path / "file").read_text() == "x"
