"""What `bench packed` starts; nothing is trained."""

import json
import runpy
from pathlib import Path

from moejax.benchmarks import packed
from moejax.benchmarks.packed import ARMS, bench_packed
from moejax.config import resolve
from training_cases import small_config


def test_every_side_trains_the_same_arms_and_starts_with_what_it_says(monkeypatch):
    started, kept = [], []

    def note(self, *arguments, programs=None):
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        started.append((arguments[0], flags, bool(programs and programs.exists())))
        recipe = runpy.run_path(flags["config"])["get_config"]()
        assert resolve(recipe).model == small_config().model
        if programs:
            assert programs.is_relative_to(Path(flags["config"]).parent) and programs not in kept
            kept.append(programs)
            programs.mkdir(exist_ok=True)

    monkeypatch.setattr(packed._Sides, "_run", note)
    found = bench_packed(small_config(), 2)
    json.dumps(found)
    assert found["arms"] == ARMS and len(found["each_s"]["separate"]) == 2
    warm_up, first = started[:2], started[2 : 2 + ARMS + 3]
    assert [(flags["pack"], had) for _, flags, had in warm_up] == [("1", False), (str(ARMS), False)]
    assert [flags.get("config.train.seed") for _, flags, _ in first[:ARMS]] == [str(seed) for seed in range(ARMS)]
    assert {verb for verb, *_ in first[:ARMS]} == {"train"}
    sweeps = [(flags["pack"], flags["seeds"], had) for _, flags, had in first[ARMS:]]
    assert sweeps == [("1", str(ARMS), True), (str(ARMS), str(ARMS), False), (str(ARMS), str(ARMS), True)]
    folders = [flags.get("dir") or flags["workdir"] for _, flags, _ in started]
    assert len(set(folders)) == len(folders), "a side found what another had trained"
