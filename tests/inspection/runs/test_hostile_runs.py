"""A run directory from anyone: opening it reads, writes, imports and waits for nothing outside."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cases.training import small_config
from moejax.cli import main
from moejax.data import DataError, load_tokenizer, prepare
from moejax.inspection import open_run
from moejax.inspection.runs.run import RunError
from moejax.training.loop import train
from moejax.training.run_directory.text import TextPlaces, open_run_corpus

DEBUG = Path(__file__).parents[3] / "configs/debug.py"
CANARY = "SECRET canary text"
MARKUP = "<script>alert(1)</script>"
TEXTS = "".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run on JSON lines, with the text and the rows next to it."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "texts.jsonl").write_text(TEXTS)
    data = {
        "source": "files",
        "files": str(folder / "texts.jsonl"),
        "directory": str(folder / "data"),
    }
    config = small_config(data=data, train={"num_steps": 2, "log_every": 1, "eval_every": 2})
    train(config, folder / "run")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(folder / "run", tmp_path / "copy"))


def verbs(workdir):
    """A command line for each verb that takes a run."""
    return [
        ["eval", f"--workdir={workdir}", "--json"],
        ["generate", f"--workdir={workdir}", "--prompt=a", "--max_tokens=2"],
        ["report", f"--workdir={workdir}"],
        ["report", str(workdir), str(workdir)],
        ["counterfactuals", f"--workdir={workdir}", "--kinds=top_k"],
        ["placement", f"--workdir={workdir}", "--devices=2"],
        ["train", f"--config={DEBUG}", f"--workdir={workdir}"],
    ]


def change_record(workdir, change):
    path = workdir / "config.json"
    recorded = json.loads(path.read_text())
    change(recorded)
    path.write_text(json.dumps(recorded))


@pytest.mark.slow
def test_links_and_pipes_in_place_of_any_file_stop_every_verb(copy, tmp_path, capfd):
    canary = tmp_path / "canary"
    canary.write_text(CANARY)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    kinds = {path.relative_to(copy).parts[0]: path for path in files}
    assert kinds.keys() >= {
        "config.json",
        "metrics.jsonl",
        "tokenizer.json",
        "checkpoints",
        "routing",
    }
    for path in kinds.values():
        kept = path.with_name("kept")
        path.rename(kept)
        for place in (lambda path=path: path.symlink_to(canary), lambda path=path: os.mkfifo(path)):
            place()
            for arguments in verbs(copy):
                assert main(arguments) == 2, (path, arguments)
            with pytest.raises(
                RunError,
                match=r"symbolic link out of the run directory|neither a file nor a folder",
            ):
                open_run(copy)
            path.unlink()
        kept.rename(path)
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert canary.read_text() == CANARY


def test_names_with_markup_and_control_characters_stay_text(copy, tmp_path, capfd):
    folder = copy.rename(tmp_path / "<img src=x onerror=alert(1)>\x1b[2J")
    change_record(
        folder, lambda recorded: recorded.update(command=f"moejax train {MARKUP}", device=MARKUP)
    )
    for arguments in verbs(folder)[:-1]:
        code = main(arguments)
        printed = capfd.readouterr()
        assert code in (0, 2), (arguments, printed.err)
        assert "\x1b" not in printed.out + printed.err and "Traceback" not in printed.err, arguments
    pages = list(tmp_path.rglob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text()
        assert "<img src=x" not in text
        assert MARKUP not in text
        assert "\x1b" not in text


def test_links_that_stay_inside_of_a_run_are_followed(copy):
    (copy / "latest").symlink_to("metrics.jsonl")
    assert open_run(copy).last_step == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_nests_deeply_is_damage_in_one_line(copy, name, capfd):
    (copy / name).write_text('{"config": ' + "[" * 200_000)
    for arguments in verbs(copy):
        if arguments[0] != "train" and (name, arguments[0]) not in {
            ("tokenizer.json", "placement")
        }:
            is_comparison = len(arguments) == 3 and not arguments[1].startswith("--")
            assert main(arguments) == 2 or (name == "tokenizer.json" and is_comparison), arguments
    assert "Traceback" not in capfd.readouterr().err


def test_places_that_a_foreign_run_names_are_neither_read_nor_written(
    copy, tmp_path, monkeypatch, capfd
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "canary.jsonl").write_text(TEXTS.replace("document", CANARY))
    monkeypatch.chdir(tmp_path)

    def point_elsewhere(recorded):
        for places in (recorded["config"]["data"], recorded["text"]):
            places["files"], places["directory"] = (
                str(elsewhere / "canary.jsonl"),
                str(elsewhere / "data"),
            )

    change_record(copy, point_elsewhere)
    for verb in ("eval", "report", "counterfactuals"):
        assert main([verb, f"--workdir={copy}"]) == 2
    printed = capfd.readouterr()
    assert printed.err.count("are not trusted, since it was not written by this user here") == 3
    assert "--data.directory= and --data.files=" in printed.err
    assert CANARY not in printed.out + printed.err
    assert [path.name for path in elsewhere.iterdir()] == ["canary.jsonl"]
    assert not (tmp_path / "data").exists()
    assert not any(
        CANARY.encode() in path.read_bytes() for path in copy.rglob("*") if path.is_file()
    )


def test_a_run_of_ones_own_finds_its_text_from_anywhere_and_makes_no_folder(
    copy, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", f"--workdir={copy}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["step"] == 2
    assert not (tmp_path / "data").exists()


def test_rows_that_are_gone_are_prepared_again_where_they_were_recorded(
    folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(folder / "run")
    first = open_run_corpus(folder / "run", tokenizer)
    shutil.rmtree(first.directory)
    with caplog.at_level("INFO", logger="moejax"):
        again = open_run_corpus(folder / "run", tokenizer)
    assert (again.directory, again.num_tokens) == (first.directory, first.num_tokens)
    assert f"are not in {folder / 'data'} and are prepared there" in caplog.text


def test_moved_text_is_named_by_flags_and_changed_text_is_refused(copy, folder, tmp_path):
    tokenizer = load_tokenizer(copy)
    moved, rows = tmp_path / "moved.jsonl", str(tmp_path / "rows")
    moved.write_text(TEXTS)
    # As in a run from elsewhere, or of an older version.
    change_record(copy, lambda recorded: recorded.pop("text"))
    with pytest.raises(DataError, match=r"say where the text is, by --data\.files="):
        open_run_corpus(copy, tokenizer, TextPlaces(directory=rows))
    corpus = open_run_corpus(copy, tokenizer, TextPlaces(directory=rows, files=str(moved)))
    assert corpus.directory.parent == tmp_path / "rows/rows"
    assert (
        open_run_corpus(copy, tokenizer, TextPlaces(directory=rows)).directory == corpus.directory
    )
    shutil.rmtree(corpus.directory)
    moved.write_text(TEXTS + TEXTS)
    with pytest.raises(
        DataError, match=r"gives the rows files-.*, not files-.*, on which the run was trained"
    ):
        open_run_corpus(copy, tokenizer, TextPlaces(directory=rows, files=str(moved)))
    assert [*corpus.directory.parent.iterdir()] == []


def test_rows_of_another_name_or_tokenizer_are_never_taken(copy, folder, tmp_path):
    tokenizer = load_tokenizer(copy)
    config = small_config(data={"directory": str(tmp_path / "data")})
    other = prepare(config.data).directory
    name = json.loads((copy / "config.json").read_text())["corpus"]
    shutil.copytree(other, tmp_path / "data/rows" / name)
    with pytest.raises(DataError, match=r"manifest\.json is that of other rows"):
        open_run_corpus(copy, tokenizer, TextPlaces(directory=str(tmp_path / "data")))
    for name in ("../../rows", "/etc", "a/b-0123456789ab", ""):
        change_record(copy, lambda recorded, name=name: recorded.update(corpus=name))
        with pytest.raises(DataError, match="is no name of prepared rows"):
            open_run_corpus(copy, tokenizer, TextPlaces(directory=str(tmp_path / "data")))
