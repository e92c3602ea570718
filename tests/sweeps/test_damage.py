"""Damaged and hostile sweep directories: an error of one line, or a complete page.

Nothing in them is executed, and no link is followed out of them.
"""

import json
import os
import shutil

import pytest

from cases.sweeps import entry_of, product, write_definition, write_run
from moejax.cli import main
from moejax.sweeps.report.page import build_sweep_page
from moejax.sweeps.report.write import build_sweep_report
from moejax.sweeps.store.record_files import RecordError
from moejax.sweeps.store.records import (
    collect,
    read_definition,
    read_record,
    read_records,
    record_of,
    write_record,
)
from moejax.sweeps.tables import frame_of

DEEP = "[" * 100_000
TEXTS = ("x", "", "[", DEEP, "[3]", "{}")
NUMBERS = (1, 0, -1, 1e308, 10**400, True)
VALUES = (*TEXTS, *NUMBERS, None, [], ["x"], {}, {"a": 1}, [[1, None, 1]])


@pytest.fixture(scope="module")
def intact_sweep(tmp_path_factory):
    """A sweep of one setting, whose page has no figures; one of its four arms failed."""
    directory = tmp_path_factory.mktemp("sweeps") / "intact"
    entries = [entry_of(point) for point in product(moe_top_k=[1], train_seed=[0, 1, 2, 3])]
    write_definition(directory, entries)
    for i, entry in enumerate(entries):
        workdir = write_run(directory / "arms" / entry["id"], entry, loss=2.0 + i / 7, dropped=0.1)
        ending = {"status": "done", "error": None}
        if i == 3:
            ending = {"status": "failed", "error": "not finite"}
        row = record_of(workdir, entry, **ending, wall_s=1, step_s=0.1, packed=1)
        write_record(workdir, row)
    build_sweep_report(directory)
    return directory


@pytest.fixture
def sweep(intact_sweep, tmp_path):
    shutil.copytree(intact_sweep, tmp_path / "sweep")
    return tmp_path / "sweep"


def record_file(sweep):
    return min(sweep.glob("arms/*/record.json"))


def damages(content):
    """Returns ways in which a file may be damaged, by name."""
    return {
        "emptied": b"", "truncated": content[: len(content) // 2], "zeros": bytes(len(content)),
        "not UTF-8": b"\xff\xfe" + content, "another kind": b'["a"]', "a number": b"3",
        "nested deeply": DEEP.encode(), "another file": b"%PDF-1.4\n",
        "two of them": content + content,
    }  # fmt: skip


def in_place_of(path, outside):
    """Returns what may be there in place of a file, by name."""
    return {
        "a folder": lambda: path.mkdir(),
        "a named pipe": lambda: os.mkfifo(path),
        "a link out": lambda: path.symlink_to(outside),
        "a link to nothing": lambda: path.symlink_to("/nowhere/else"),
    }


@pytest.mark.parametrize("name", ["sweep.json", "record.json"])
def test_a_damaged_file_of_a_sweep_is_one_line_that_names_it(name, sweep, tmp_path, capsys):
    path = sweep / name if name == "sweep.json" else record_file(sweep)
    content = path.read_bytes()
    outside = tmp_path / "outside.json"
    outside.write_bytes(content)
    for damage, damaged in damages(content).items():
        path.write_bytes(damaged)
        assert main(["sweep", "report", str(sweep)]) == 2, damage
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and len(error) < 600, damage
    for damage, put in in_place_of(path, outside).items():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        put()
        assert main(["sweep", "report", str(sweep)]) == 2, damage
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, damage


@pytest.mark.parametrize("name", ["records.jsonl", "records.parquet", "report.html"])
def test_a_damaged_file_that_a_report_writes_is_written_again_or_named(
    name, sweep, tmp_path, capsys
):
    path = sweep / name
    content = path.read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    for damage, damaged in damages(content).items():
        path.write_bytes(damaged)
        if name != "report.html" and damage != "two of them":
            if name == "records.parquet":
                (sweep / "records.jsonl").unlink()
            check_refused(lambda: read_records(sweep), name, damage)
        assert main(["sweep", "report", str(sweep)]) == 0 and path.stat().st_size, damage
    for damage, put in in_place_of(path, outside).items():
        path.unlink()
        put()
        code = main(["sweep", "report", str(sweep)])
        error = capsys.readouterr().err
        if damage == "a folder":
            assert code == 2 and name in error and error.count("\n") == 1
        else:
            assert code == 0, damage
        if path.is_dir():
            path.rmdir()
            path.touch()
    assert outside.read_bytes() == b"kept"


def check_refused(read, name, damage):
    """Only an emptied file may be read, as one without rows."""
    try:
        rows = read()
    except RecordError as error:
        assert name in str(error) and "\n" not in str(error), damage
    else:
        assert damage == "emptied" and not len(rows), damage


def test_every_value_of_a_record_is_refused_or_shown_on_the_page(sweep):
    path = record_file(sweep)
    row = json.loads(path.read_text())
    accepted = []
    for key in row:
        for value in VALUES:
            path.write_text(json.dumps(row | {key: value}))
            try:
                accepted.append(read_record(path.parent) | {"arm": row["arm"]})
            except RecordError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
    assert len(accepted) > 2 * len(row)
    for part in (accepted, accepted[::7], accepted[-3:]):
        document = build_sweep_page(frame_of(part), read_definition(sweep))
        assert document.endswith("</html>\n")


def test_a_record_whose_texts_are_no_json_is_named(sweep):
    path = record_file(sweep)
    row = json.loads(path.read_text())
    for key in ("versions", "alarm_rules", "evaluations"):
        path.write_text(json.dumps(row | {key: "no JSON"}))
        message = f"record.json: {key}='no JSON' must be .* as JSON text; remove it and run"
        with pytest.raises(RecordError, match=message):
            collect(sweep)


def test_every_value_of_a_definition_is_refused_or_shown_on_the_page(sweep):
    path = sweep / "sweep.json"
    definition = json.loads(path.read_text())
    frame = read_records(sweep)
    accepted = 0

    def is_accepted(**changes):
        path.write_text(json.dumps(definition | changes))
        try:
            found = read_definition(sweep)
        except RecordError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
            return False
        assert build_sweep_page(frame.iloc[:0], found).endswith("</html>\n")
        return True

    entry, *others = definition["arms"]
    for value in VALUES:
        accepted += sum(is_accepted(**{key: value}) for key in definition)
        accepted += sum(is_accepted(arms=[entry | {key: value}, *others]) for key in entry)
        overrides = {"a.b": value, "train.seed": value}
        accepted += is_accepted(arms=[entry | {"overrides": overrides}, *others])
        accepted += is_accepted(packs=[value])
    assert accepted > 50
    with pytest.raises(RecordError, match="is there twice"):
        path.write_text(json.dumps(definition | {"arms": [entry, entry]}))
        read_definition(sweep)


def test_nothing_is_read_or_written_through_a_link_out_of_a_sweep(sweep, tmp_path, capsys):
    outside = tmp_path / "outside"
    arm = record_file(sweep).parent
    for path in (arm, sweep / "arms", sweep / "claims"):
        kept = tmp_path / "kept"
        path.rename(kept)
        shutil.copytree(kept, outside)
        before = sorted(outside.rglob("*"))
        path.symlink_to(outside)
        assert main(["sweep", "report", str(sweep)]) == 2
        error = capsys.readouterr().err
        assert "is a link out of" in error and error.count("\n") == 1
        assert sorted(outside.rglob("*")) == before
        path.unlink()
        kept.rename(path)
        shutil.rmtree(outside)
    assert main(["sweep", "report", str(sweep)]) == 0
    linked = tmp_path / "linked"
    linked.symlink_to(sweep)  # which the user names
    assert main(["sweep", "report", str(linked)]) == 0


def test_an_arm_that_failed_has_a_record_even_if_its_logs_are_damaged(tmp_path):
    entry = entry_of({"moe.top_k": 1})
    workdir = write_run(tmp_path / "arm", entry)
    facts = {"wall_s": None, "step_s": None, "packed": 1}
    for damaged in ('{"step": 1\n{"step": 2}\n', '["a"]\n'):
        (workdir / "metrics.jsonl").write_text(f"{damaged}\n{{}}\n")
        row = record_of(workdir, entry, status="failed", error="loss is nan\nat step 3", **facts)
        assert row["status"] == "failed"
        assert row["error"].startswith("loss is nan; what it logged is not in its record")
        write_record(workdir, row)
        assert read_record(workdir) == row
        with pytest.raises(RecordError, match=r"metrics.jsonl"):
            record_of(workdir, entry, status="done", error=None, **facts)


def test_names_in_a_sweep_cannot_control_the_terminal(sweep, capsys):
    path = sweep / "sweep.json"
    definition = json.loads(path.read_text())
    for entry in definition["arms"]:
        entry["overrides"]["moe.router"] = "a\x1b]0;title\x07\x9b2J\u202e"
    path.write_text(json.dumps(definition))
    assert main(["sweep", "report", str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert "moe.router=a\\x1b]0;title" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)
