"""A corpus is prepared once, completely or not at all, and damage is found and named."""

import dataclasses
import importlib
import json
import logging
import resource
import subprocess
import sys
import threading
from shutil import rmtree

import numpy as np
import pytest

from moejax.config import ConfigError, DataConfig
from moejax.data.errors import DataError
from moejax.data.packing import FEATURES, pack
from moejax.data.rows import prepare
from moejax.data.sources.choose import Document, Source, open_source
from moejax.data.storage import records
from moejax.data.tokenizers import ByteTokenizer

SPLITS = ("train", "validation")


def synthetic(directory, **changes):
    base = {"source": "synthetic", "tokenizer": "bytes", "seq_len": 64}
    return DataConfig(**(base | {"directory": str(directory)} | changes))


@pytest.fixture
def corpus(tmp_path):
    return prepare(synthetic(tmp_path))


def test_prepared_rows_are_the_packed_documents_in_order(corpus):
    documents = open_source(DataConfig(source="synthetic")).documents
    for split in SPLITS:
        texts = [document.text for document in documents(split)]
        expected = list(pack([[1, *(b + 3 for b in text.encode()), 2] for text in texts], 64))
        rows = corpus.rows(split)
        assert len(rows) == len(expected) == corpus.num_rows[split]
        for row, wanted in zip(rows, expected, strict=True):  # a sequence ends where it ends
            assert all(row[name].dtype == np.int32 for name in FEATURES)
            np.testing.assert_equal(row, wanted)
        assert corpus.num_documents[split] == len(texts)
        assert corpus.num_bytes[split] == sum(len(text.encode()) for text in texts)
        num_ends = len(texts)  # each document has an end
        assert corpus.num_tokens[split] == corpus.num_bytes[split] + num_ends


def test_each_setting_that_changes_rows_has_a_folder_of_its_own(tmp_path):
    settings = [
        {},
        {"seq_len": 65},
        {"tokenizer": "bpe", "vocab_size": 512},
        {"tokenizer": "bpe", "vocab_size": 520},
    ]
    folders = {prepare(synthetic(tmp_path, **changes)).directory for changes in settings}
    assert len(folders) == 4
    assert all(folder.name.startswith("synthetic-") for folder in folders)
    # What does not determine the rows does not prepare them again.
    assert prepare(synthetic(tmp_path, vocab_size=999)).directory in folders


def test_changed_files_are_prepared_again(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    data = synthetic(tmp_path / "data", source="files", files=str(tmp_path / "*.txt"))
    before = prepare(data)
    (tmp_path / "b.txt").write_text("changed")
    after = prepare(data)
    assert before.directory != after.directory
    assert prepare(data).directory == after.directory


def test_a_given_tokenizer_replaces_the_configured_one(tmp_path):
    data = synthetic(tmp_path, tokenizer="bpe", vocab_size=512)
    learnt = prepare(data)
    assert prepare(synthetic(tmp_path), tokenizer=learnt.tokenizer).directory == learnt.directory
    assert prepare(data, tokenizer=ByteTokenizer()).tokenizer.kind == "bytes"


def test_bpe_never_sees_validation_text(tmp_path):
    # A certain word and character are only in the last twentieth, which is held out.
    train = "common words again and again. " * 380
    validation = "Ж zebra " * 75
    (tmp_path / "text.txt").write_text(train + validation, encoding="utf-8")
    data = synthetic(
        tmp_path / "data",
        source="files",
        files=str(tmp_path / "text.txt"),
        tokenizer="bpe",
        vocab_size=300,
    )
    assert "Ж" not in "".join(document.text for document in open_source(data).documents("train"))
    tokenizer = prepare(data).tokenizer
    pieces = "".join(tokenizer.piece(i) for i in range(tokenizer.vocab_size))
    assert "\u2581words" in pieces
    assert "Ж" not in pieces
    assert "zeb" not in pieces


def test_preparation_and_sizes_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="moejax"):
        corpus = prepare(synthetic(tmp_path))
    messages = [record.getMessage() for record in caplog.records if record.name == "moejax"]
    assert any(str(corpus.directory) in message for message in messages)
    assert any("prepared rows in" in message for message in messages)
    assert any(f"train: {corpus.num_rows['train']} rows" in message for message in messages)


def test_preparation_writes_nothing_to_standard_output(tmp_path, capfd):
    prepare(synthetic(tmp_path))
    assert capfd.readouterr().out == ""


def test_an_interrupted_preparation_leaves_nothing_and_is_redone(tmp_path, monkeypatch):
    data = synthetic(tmp_path)
    write_rows = records.write_rows

    def interrupted(folder, rows, seq_len):
        write_rows(folder, rows, seq_len)  # everything but the manifest
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data)
    assert list((tmp_path / "rows").iterdir()) == []
    monkeypatch.undo()
    assert prepare(data).num_rows["train"] > 100


def test_a_killed_preparation_is_redone(tmp_path):
    # Killed without a chance to clean up: the temporary folder stays and is never taken for the
    # finished one.
    code = """if True:
        import os, sys
        from moejax.config import DataConfig
        from moejax.data import prepare
        import moejax.data.storage.records as records
        write = records.write_rows
        records.write_rows = lambda *args: (write(*args), os._exit(9))
        data = DataConfig(source="synthetic", tokenizer="bytes", seq_len=64, directory=sys.argv[1])
        prepare(data)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 9
    assert ["incomplete" in path.name for path in (tmp_path / "rows").iterdir()] == [True]
    corpus = prepare(synthetic(tmp_path))
    assert corpus.rows("train")[0]["tokens"][0] == 1


def test_a_preparation_that_comes_second_keeps_the_first(tmp_path, monkeypatch):
    data = synthetic(tmp_path)
    write_rows = records.write_rows

    def overtaken(folder, rows, seq_len):
        monkeypatch.undo()
        prepare(data)  # another process does it meanwhile
        write_rows(folder, rows, seq_len)

    monkeypatch.setattr(records, "write_rows", overtaken)
    corpus = prepare(data)
    assert list((tmp_path / "rows").iterdir()) == [corpus.directory]
    assert len(corpus.rows("train")) == corpus.num_rows["train"]


def array_record(corpus, split="train"):
    (file,) = (corpus.directory / "rows" / "1.0.0").glob(f"*{split}*")
    return file


def change_manifest(change):
    def damage(corpus):
        path = corpus.directory / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


DAMAGE = {
    "a truncated file": lambda c: array_record(c).write_bytes(
        array_record(c).read_bytes()[:-70_000]
    ),
    "a missing file": lambda c: array_record(c, "validation").unlink(),
    "a missing file of labels": lambda c: (c.directory / "documents.validation.jsonl").unlink(),
    "no manifest": lambda c: (c.directory / "manifest.json").unlink(),
    "an empty manifest": lambda c: (c.directory / "manifest.json").write_text(""),
    "a manifest of another type": lambda c: (c.directory / "manifest.json").write_text("[1]"),
    "a manifest without a split": change_manifest(lambda m: m["splits"].pop("validation")),
    "a manifest without a count": change_manifest(lambda m: m["splits"]["train"].pop("num_bytes")),
    "a manifest without files": change_manifest(lambda m: m.pop("files")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_on_opening_and_the_remedy_works(corpus, tmp_path, damage):
    damage(corpus)
    with pytest.raises(DataError) as error:
        prepare(synthetic(tmp_path))
    message = str(error.value)
    assert f"remove the folder {corpus.directory} and run the command again" in message
    assert "\n" not in message
    records.shutil.rmtree(corpus.directory)
    assert prepare(synthetic(tmp_path)).num_rows == corpus.num_rows


def test_damage_inside_a_file_of_the_right_size_is_found_on_reading(corpus, tmp_path):
    file = array_record(corpus)
    raw = bytearray(file.read_bytes())
    raw[20_000:21_000] = bytes(byte ^ 0xFF for byte in raw[20_000:21_000])
    file.write_bytes(raw)
    rows = prepare(synthetic(tmp_path)).rows("train")
    with pytest.raises(
        DataError, match=rf"row \d+ cannot be read .*remove the folder {corpus.directory}"
    ) as error:
        for i in range(len(rows)):
            assert rows[i]["positions"][1] in (0, 1)
    assert "\n" not in str(error.value)


def test_rows_that_do_not_match_the_manifest_are_refused(corpus):
    wrong = dataclasses.replace(corpus, num_rows={**corpus.num_rows, "train": 3})
    with pytest.raises(DataError, match=r"train has .* rows instead of 3; remove the folder"):
        wrong.rows("train")


def test_an_unknown_split_lists_the_known_ones(corpus):
    with pytest.raises(ValueError, match="split='test' must be one of train, validation"):
        corpus.rows("test")


def test_documents_that_fail_while_preparing_say_so_and_leave_nothing(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "broken.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"broken\.txt is not UTF-8"):
        prepare(synthetic(tmp_path / "data", source="files", files=str(tmp_path / "*.txt")))
    assert list((tmp_path / "data" / "rows").iterdir()) == []


def test_a_split_without_documents_is_refused(tmp_path, monkeypatch):
    documents = {"train": [Document("text")], "validation": []}
    empty = Source("empty", "empty", lambda split: iter(documents[split]))
    monkeypatch.setattr("moejax.data.rows.open_source", lambda data: empty)
    with pytest.raises(DataError, match="split validation of the data has no documents; add some"):
        prepare(synthetic(tmp_path))


def test_a_vocabulary_that_does_not_fit_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.vocab_size=4096 is too large"):
        prepare(synthetic(tmp_path, tokenizer="bpe", vocab_size=4096))
    assert list((tmp_path / "tokenizers").iterdir()) == []


def test_a_second_preparation_waits_until_the_first_ends_or_dies(tmp_path, caplog):
    first = prepare(synthetic(tmp_path)).directory
    rmtree(first)
    code = """if True:
        import sys, time
        from moejax.locks import FolderLock
        with FolderLock(sys.argv[1], "prepare"):
            print("held", flush=True)
            time.sleep(60)"""
    lock = tmp_path / "locks" / f"rows-{first.name}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        killer = threading.Timer(1.0, holder.kill)
        killer.start()
        with caplog.at_level(logging.INFO, logger="moejax"):
            assert prepare(synthetic(tmp_path)).directory == first
        killer.join()
    assert f"waiting for process {holder.pid} on " in caplog.text


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(
            DataError,
            match=r"cannot be written \(.*File too large.*\); free space there, or choose",
        ) as error:
            prepare(synthetic(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot be made .*choose another data\.directory"):
        prepare(synthetic(tmp_path / "data"))


def test_importing_the_package_loads_neither_tensorflow_datasets_nor_grain():
    code = """if True:
        import sys
        import moejax.data
        print({"tensorflow_datasets", "grain", "sentencepiece"} & set(sys.modules))"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_package_offers_what_it_lists():
    package = importlib.import_module("moejax.data")
    assert all(hasattr(package, name) for name in package.__all__)
