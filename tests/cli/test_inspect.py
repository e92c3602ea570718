"""`moejax inspect`, and what is said of released weights that trained nothing here."""

import functools
import json
import re

import pytest

from cases.hf import FOLDER, write_released, write_texts
from cases.pages import Page
from moejax.cli import main
from moejax.inspection.counterfactuals.evaluate import counterfactuals
from moejax.inspection.runs.run import open_run
from moejax.inspection.viewer.run_folder import RunFolder
from moejax.interop.hf.conversion.to_run import convert_to_run

LONGCAT = f"--hf={FOLDER / 'longcat_flash'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released model, text, and the model as a run that trained nothing."""
    folder = tmp_path_factory.mktemp("inspect")
    write_released(folder / "model")
    write_texts(folder / "texts")
    convert_to_run(folder / "model", folder / "run")
    return folder


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


TEXTS = "--data.files=texts/*.txt"


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def sources_of_rows(folder):
    """Returns what the rows were made of that were prepared in a folder."""
    return {path.name.split("-")[0] for path in (folder / "data" / "rows").iterdir()}


def test_a_released_model_is_inspected_from_its_folder_alone(in_folder, capsys):
    before = contents(in_folder / "model")
    command = ["inspect", "--hf=model", TEXTS, "--rows=2", "--prompt=The people of the town"]
    assert main([*command, "--html=page.html"]) == 0
    shown = capsys.readouterr().out
    assert "tokens of 2 validation rows" in shown
    assert re.search(r"layer +least load +most load +entropy +first weight", shown)
    assert re.search(r"Trace of 6 tokens through 2 MoE layers of 4 experts\ntoken +piece", shown)
    assert "▁people" in shown
    assert f"page: {in_folder / 'page.html'}" in shown
    page = (in_folder / "page.html").read_text()
    assert "<h1>model</h1>" in page and 'id="coactivation"' in page
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["experts"], found["page"]) == (2, 4, None)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert sum(found["layers"][0]["load"]) == pytest.approx(4)
    assert found["traces"][0]["pieces"][1] == "▁people"
    assert len(found["traces"][0]["experts"]) == 2
    assert found["counterfactuals"] is None
    assert contents(in_folder / "model") == before
    assert sources_of_rows(in_folder) == {"files"}


def test_without_a_prompt_the_beginning_of_a_row_is_traced(in_folder, capsys):
    assert main(["inspect", "--hf=model", TEXTS, "--rows=1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["traces"]
    assert len(found["tokens"]) == 65  # a row and the token after it
    assert len(found["experts"][0]) == 65


def test_a_model_without_a_tokenizer_routes_token_ids(in_folder, capsys, caplog):
    assert main(["inspect", LONGCAT, "--prompt=5 17 3", "--html=ids.html"]) == 0
    shown = capsys.readouterr().out
    assert "3 tokens of the prompts" in shown
    assert "0      5 " in shown
    (line,) = [line for line in caplog.messages if "tokenizer" in line]
    assert "no rows are routed: all figures are of the prompts" in line
    page = Page((in_folder / "ids.html").read_text())
    assert "3 tokens of the prompts were routed" in page.text


def test_a_run_of_converted_weights_gets_its_page(in_folder, capsys):
    assert main(["inspect", "--workdir=run", TEXTS, "--rows=1", "--step=0"]) == 0
    assert f"page: {in_folder / 'run' / 'inspection.html'}" in capsys.readouterr().out
    assert "step 0" in (in_folder / "run" / "inspection.html").read_text()
    assert sources_of_rows(in_folder) == {"files"}  # not the speeches, as if none were named
    assert "Parameters" in open_run("run")._repr_html_()


def test_what_cannot_be_inspected_is_one_line(in_folder, capsys):
    (in_folder / "model" / "data").mkdir(exist_ok=True)
    for arguments, line in (
        ([f"--hf={FOLDER / 'mistral'}"], "mistral is dense: it has no experts"),
        ([LONGCAT], 'give token ids to trace, such as --prompt="5 17 3"'),
        ([LONGCAT, "--prompt=5", "--rows=1"], "--rows=1 needs rows of text"),
        ([LONGCAT, "--prompt=five"], "text must be token ids below 131"),
        (["--hf=model", "--html=model/x.html"], "in the released model's folder, where nothing"),
        (["--hf=model", "--data.directory=model/data"], "data.directory=model/data is in the rel"),
        (["--hf=model", "--step=1"], "--step=1 goes with --workdir only"),
        (["--hf=model", "--workdir=run"], "--hf and --workdir exclude each other"),
        (["--hf=model", "--data.source_dir=x"], "--data.source_dir=x goes with data.source=tfds"),
        (["--workdir=run", "--html=nowhere/x.html"], "nowhere is not a folder"),
        ([], "--workdir is missing"),
    ):
        assert main(["inspect", *arguments]) == 2, arguments
        shown, log = capsys.readouterr()
        assert shown == ""
        last = log.splitlines()[-1]
        assert last.startswith("moejax: ") and line in last, last
    (in_folder / "model" / "data").rmdir()


@pytest.mark.slow
def test_counterfactuals_are_of_the_rows_and_only_when_asked_for(in_folder, capsys, monkeypatch):
    few = functools.partial(counterfactuals, kinds=("uniform",))
    monkeypatch.setattr("moejax.inspection.checkpoint.measure.counterfactuals", few)
    command = ["inspect", "--hf=model", TEXTS, "--rows=2", "--prompt=a", "--counterfactuals"]
    assert main([*command, "--json", "--html=changed.html"]) == 0
    found = json.loads(capsys.readouterr().out)["counterfactuals"]
    assert found["num_rows"] == 2
    assert {row["kind"] for row in found["rows"]} == {"as trained", "uniform"}
    assert 'id="counterfactuals"' in (in_folder / "changed.html").read_text()


@pytest.mark.slow
def test_converted_weights_are_evaluated_on_the_files_that_are_named(in_folder, capsys):
    assert main(["eval", "--hf=model", TEXTS, "--json"]) == 0
    released = json.loads(capsys.readouterr().out)
    assert main(["eval", "--workdir=run", TEXTS, "--json"]) == 0
    converted = json.loads(capsys.readouterr().out)
    assert converted["tokens"] == released["tokens"] < 10_000
    assert converted["validation loss"] == pytest.approx(released["validation loss"], abs=2e-4)
    assert main(["counterfactuals", "--workdir=run", TEXTS, "--rows=2", "--kinds=uniform"]) == 0
    assert "all experts alike" in capsys.readouterr().out


def test_weights_that_trained_nothing_have_no_report_and_are_viewed(in_folder, capsys):
    assert main(["report", "--workdir=run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "converted weights that have trained nothing" in line
    assert "moejax inspect --workdir=" in line
    runs = RunFolder(in_folder)
    runs.poll()
    state = runs.runs["run"].state
    assert (state.steps, state.problem) == (0, "")
