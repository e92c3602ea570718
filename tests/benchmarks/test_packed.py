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
    started, sweep_caches = [], []

    def record(self, *arguments, programs):
        verb, *words = arguments
        settings = [word.removeprefix("--").split("=", 1) for word in words if "=" in word]
        flags = dict(settings)
        started.append((verb, flags, programs.exists()))
        recipe = runpy.run_path(flags["config"])["get_config"]()
        assert resolve(recipe).model == small_config().model
        assert programs.is_relative_to(Path(flags["config"]).parent)
        programs.mkdir(exist_ok=True)
        if verb == "sweep":
            sweep_caches.append(programs)

    monkeypatch.setattr(packed._Sides, "_run", record)
    found = bench_packed(small_config(), 2)
    json.dumps(found)
    assert found["arms"] == ARMS and len(found["each_s"]["separate"]) == 2
    all_arms = str(ARMS)
    warm_up = [(flags["pack"], had_cache) for _, flags, had_cache in started[:2]]
    assert warm_up == [("1", False), (all_arms, False)]
    separate = started[2 : 2 + ARMS]
    assert {verb for verb, *_ in separate} == {"train"}
    seeds = [flags.get("config.train.seed") for _, flags, _ in separate]
    assert seeds == [str(seed) for seed in range(ARMS)]
    assert [had_cache for *_, had_cache in separate] == [False] + [True] * (ARMS - 1)
    others = started[2 + ARMS : 2 + ARMS + 3]
    sweeps = [(flags["pack"], flags["seeds"], had_cache) for _, flags, had_cache in others]
    assert sweeps == [
        ("1", all_arms, True),
        (all_arms, all_arms, False),
        (all_arms, all_arms, True),
    ]
    # A cache that is kept stays in one place, and belongs to one side.
    of_one, of_pack = sweep_caches[:2]
    assert sweep_caches[2::3] == [of_one] * 2 and sweep_caches[4::3] == [of_pack] * 2
    assert len({of_one, of_pack, *sweep_caches[3::3]}) == 4
    folders = [flags.get("dir") or flags["workdir"] for _, flags, _ in started]
    assert len(set(folders)) == len(folders), "a side found what another had trained"


def test_a_side_has_its_own_cache_and_its_failure_is_an_error(monkeypatch, tmp_path):
    started = []
    codes = iter((0, 0, 3))

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
