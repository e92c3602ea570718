"""Training on the tokens of a released model's tokenizer: its file is read once, and kept."""

import json
import shutil
from pathlib import Path

import pytest

from cases.tokenizers import WRITERS, json_content
from moejax.cli import main
from moejax.data.tokenizers import load_tokenizer, open_tokenizer

DEBUG = Path(__file__).parents[2] / "configs/debug.py"


def train(tokenizer, workdir="run", steps=4, *more):
    return main(
        [
            "train",
            f"--config={DEBUG}",
            f"--config.data.tokenizer={tokenizer}",
            f"--config.train.num_steps={steps}",
            f"--workdir={workdir}",
            "--report=false",
            *more,
        ]
    )


@pytest.fixture(scope="module", params=sorted(WRITERS))
def trained(request, tmp_path_factory):
    """A run on each kind, begun with a relative path; the folder of its tokenizer is gone."""
    folder = tmp_path_factory.mktemp(request.param)
    path = WRITERS[request.param](folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(f"model/{path.name}") == 0
    shutil.move(folder / "model", folder / "elsewhere")
    return folder, folder / "elsewhere" / path.name


@pytest.fixture
def in_folder(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    return trained


def test_a_run_records_where_the_file_was_and_keeps_a_copy(in_folder):
    folder, moved = in_folder
    config = json.loads((folder / "run/config.json").read_text())["config"]
    tokenizer = open_tokenizer(moved)
    assert config["data"]["tokenizer"] == str(folder / "model" / moved.name)
    assert config["model"]["vocab_size"] == tokenizer.vocab_size
    assert (folder / "run/tokenizer.model").read_bytes() == moved.read_bytes()
    assert load_tokenizer(folder / "run").fingerprint == tokenizer.fingerprint


def test_a_run_is_used_and_continued_without_the_file(in_folder, capsys):
    folder, moved = in_folder
    assert main(["eval", "--workdir=run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits per byte"] > 0
    arguments = ["generate", "--workdir=run", "--max_tokens=4", "--temperature=0"]
    assert main([*arguments, "--prompt=The people"]) == 0
    streamed = capsys.readouterr().out
    assert main([*arguments, "--prompt=The people", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert streamed == f"The people{row['text']}\n"
    rows = open_tokenizer(moved).vocab_size
    gone = folder / "model" / moved.name
    assert train(gone, "run", 5, f"--config.model.vocab_size={rows}") == 0
    assert train(moved, "run", 6) == 0
    assert (folder / "run/checkpoints/6").is_dir()


def test_a_changed_file_does_not_go_on_with_a_run(in_folder, capsys):
    folder, moved = in_folder
    other = folder / "changed" / moved.name
    shutil.copytree(moved.parent, other.parent)
    settings = other.with_name("tokenizer_config.json")
    settings.write_text(settings.read_text().replace("true", "false"))
    if moved.suffix == ".json":
        other.write_bytes(other.read_bytes().replace(b"<|im_start|>", b"<|IM_START|>"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    assert train(other, "run", 9) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"moejax: data.tokenizer={other} is not the tokenizer that ")
    after = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    assert {path for path in after if before.get(path) != after[path]} <= {folder / "run/.lock"}


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (json_content(), ["--config.model.vocab_size=9"], "ids, and the embedding only 9 rows"),
        (b"{", [], "is neither a tokenizer.json nor a sentencepiece model"),
        (None, [], "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_nothing_behind(
    tmp_path, monkeypatch, capsys, content, more, message
):
    monkeypatch.chdir(tmp_path)
    path = WRITERS["json"](tmp_path / "model")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert train("model/tokenizer.json", "run", 4, *more) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    error = capsys.readouterr().err.strip()
    assert error.startswith("moejax: data.tokenizer=") and message in error
    assert "\n" not in error
