"""What `bench packed` starts; nothing is trained."""

import json
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from cases.training import small_config
from moejax.benchmarks import packed
from moejax.benchmarks.packed import ARMS, bench_packed
from moejax.benchmarks.recipe import ChildError
from moejax.config import resolve


def test_every_side_trains_the_same_arms_and_starts_with_what_it_says(monkeypatch):
    started, kept = [], []

    def note(self, *arguments, programs):
        flags = dict(
            argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument
        )
        started.append((arguments[0], flags, programs.exists()))
        recipe = runpy.run_path(flags["config"])["get_config"]()
        assert resolve(recipe).model == small_config().model
        assert programs.is_relative_to(Path(flags["config"]).parent)
        programs.mkdir(exist_ok=True)
        if arguments[0] == "sweep":
            kept.append(programs)

    monkeypatch.setattr(packed._Sides, "_run", note)
    found = bench_packed(small_config(), 2)
    json.dumps(found)
    assert found["arms"] == ARMS and len(found["each_s"]["separate"]) == 2
    warm_up, first = started[:2], started[2 : 2 + ARMS + 3]
    assert [(flags["pack"], had) for _, flags, had in warm_up] == [("1", False), (str(ARMS), False)]
    assert [flags.get("config.train.seed") for _, flags, _ in first[:ARMS]] == [
        str(seed) for seed in range(ARMS)
    ]
    assert {verb for verb, *_ in first[:ARMS]} == {"train"}
    assert [had for *_, had in first[:ARMS]] == [False] + [True] * (ARMS - 1)
    sweeps = [(flags["pack"], flags["seeds"], had) for _, flags, had in first[ARMS:]]
    assert sweeps == [
        ("1", str(ARMS), True),
        (str(ARMS), str(ARMS), False),
        (str(ARMS), str(ARMS), True),
    ]
    one, pack = kept[:2]
    assert (
        kept[2::3] == [one] * 2 and kept[4::3] == [pack] * 2
    )  # at one place, and of one side alone
    assert len({one, pack, *kept[3::3]}) == 4
    folders = [flags.get("dir") or flags["workdir"] for _, flags, _ in started]
    assert len(set(folders)) == len(folders), "a side found what another had trained"


def test_a_sweep_keeps_its_programs_in_the_folder_of_its_side_and_its_failure_is_told(
    monkeypatch, tmp_path
):
    started, codes = [], iter((0, 0, 3))

    def start(command, env, **_):
        started.append((command[3], env.get("XDG_CACHE_HOME")))
        return SimpleNamespace(returncode=next(codes), stderr="no room")

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    sides = packed._Sides(small_config(), tmp_path)
    sides.warm_up()
    assert started == [
        ("sweep", str(tmp_path / "compiled_one")),
        ("sweep", str(tmp_path / "compiled_pack")),
    ]
    with pytest.raises(ChildError, match=r"moejax train .* failed: no room"):
        sides.separate()
    verb, programs = started[-1]
    assert verb == "train" and Path(programs).parent == tmp_path
    assert programs not in [folder for _, folder in started[:-1]]
