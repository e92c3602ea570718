"""The compilation cache: where compiled programs are kept, and which folders are refused."""

import os
import subprocess
import sys

import jax
import pytest

from cases.training import small_config
from moejax.compilation_cache import (
    CompilationCacheError,
    check_is_own,
    compilation_cache_folder,
    keep_compilation_cache,
)


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Returns the options of jax that are set; the user's cache folder is `tmp_path / "cache"`."""
    found = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_programs_are_kept_whatever_the_umask_is(options, monkeypatch, tmp_path, umask):
    before = os.umask(umask)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/cache"))
    try:
        keep_compilation_cache()
    finally:
        os.umask(before)
    assert options["jax_compilation_cache_dir"] == str(tmp_path / "new/cache/moejax/compiled")


def test_programs_are_kept_in_the_users_cache_folder(options, monkeypatch, tmp_path):
    keep_compilation_cache()
    folder = tmp_path / "cache/moejax/compiled"
    assert options["jax_compilation_cache_dir"] == str(folder)
    assert folder.is_dir() and not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert compilation_cache_folder() == tmp_path / ".cache/moejax/compiled"


def test_a_folder_that_the_user_gives_to_jax_is_left_alone(options, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    keep_compilation_cache()
    assert not options and not (tmp_path / "cache").exists()


def test_the_log_says_why_programs_cannot_be_kept(options, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compilation_cache()
    assert not options and "compiled programs are not kept" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
@pytest.mark.parametrize("name", ["cache/moejax/compiled", "cache/moejax"])
def test_a_folder_that_others_can_write_is_refused(options, tmp_path, caplog, name, mode):
    (tmp_path / "cache/moejax/compiled").mkdir(parents=True)
    (tmp_path / name).chmod(mode)
    keep_compilation_cache()
    assert not options
    assert f"others may write to {tmp_path / name}" in caplog.text and "chmod 700" in caplog.text


def test_a_folder_of_another_user_is_refused(options, monkeypatch, tmp_path, caplog):
    (tmp_path / "cache/moejax/compiled").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(CompilationCacheError, match="belongs to user"):
        check_is_own(tmp_path / "cache/moejax/compiled")
    keep_compilation_cache()
    assert not options and "could put programs there" in caplog.text


COMPILE = """
import sys, jax
from moejax import compilation_cache
compilation_cache.WORTH_KEEPING_S = 0.0
compilation_cache.keep_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7)).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_second_process_finds_the_program_of_the_first(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def count_hits():
        command = [sys.executable, "-c", COMPILE]
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        return int(finished.stdout)

    assert count_hits() == 0
    assert count_hits() > 0


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_verbs_that_compile_use_the_compilation_cache(monkeypatch, verb):
    """Each verb sets it up before anything is compiled; here the verb ends at that point."""
    from moejax import cli

    class AskedError(Exception):
        pass

    def ask():
        raise AskedError

    monkeypatch.setattr(f"moejax.cli.verbs.{verb}.keep_compilation_cache", ask)
    monkeypatch.setattr("moejax.cli.verbs.train.read_config_flag", lambda values: small_config())
    given = ["--config=configs/debug.py"] if verb == "train" else ["--workdir=runs/none"]
    with pytest.raises(AskedError):
        cli.main([verb, *given])
