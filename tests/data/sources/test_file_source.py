"""The user's own text: which files, which documents, in which split, and what is wrong with it."""

import dataclasses
import errno
import gzip
import json
import os
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moejax.config import ConfigError, DataConfig
from moejax.data import DataError, prepare
from moejax.data.sources.choose import open_source
from moejax.data.sources.splits import held_out, last_held_out, split_key

SPLITS = ("train", "validation")
TEXTS = [f"document {i} " * (i + 1) for i in range(40)]


def source_of(files, **changes):
    return open_source(DataConfig(source="files", files=str(files), **changes))


def texts_of(files, **changes):
    source = source_of(files, **changes)
    return {split: [document.text for document in source.documents(split)] for split in SPLITS}


def all_texts(files, **changes):
    found = texts_of(files, **changes)
    return sorted(found["train"] + found["validation"])


def json_lines(texts, field="text", **more):
    return "".join(json.dumps({field: text, **more}) + "\n" for text in texts).encode()


def compressed(raw, kind):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, kind) as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def test_links_below_a_folder_are_followed_once(tmp_path):
    (tmp_path / "texts/own").mkdir(parents=True)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "texts/own/a.txt").write_text("one")
    (tmp_path / "elsewhere/deep/b.txt").write_text("two")
    (tmp_path / "elsewhere/round").symlink_to("../texts")
    (tmp_path / "texts/there").symlink_to("../elsewhere")
    (tmp_path / "texts/same").symlink_to("own")
    (tmp_path / "texts/c.txt").symlink_to("own/a.txt")
    assert all_texts(tmp_path / "texts") == ["one", "two"]


def test_what_a_folder_holds_and_cannot_be_read_is_an_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "texts/secret").mkdir(parents=True)
    for i in range(3):
        (tmp_path / f"texts/{i}.txt").write_text("a text")
    os.mkfifo(tmp_path / "texts/pipe")
    with caplog.at_level("INFO", logger="moejax"):
        source_of(tmp_path / "texts")
    assert (
        "left out 1 files that are no text, such as" in caplog.text and "texts/pipe" in caplog.text
    )
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(
            DataError, match=r"texts/secret cannot be read \(Permission denied\); leave it out"
        ):
            source_of(tmp_path / "texts")
    (tmp_path / "texts/gone.txt").symlink_to("nowhere")
    with pytest.raises(
        DataError,
        match=r"texts/gone\.txt is a link to a file that is not there; remove it or repair",
    ):
        source_of(tmp_path / "texts")


def test_a_folder_gives_its_files_of_text_and_says_what_it_leaves_out(tmp_path, caplog):
    (tmp_path / "news/deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "news/deep/c").write_text("three")
    (tmp_path / "news/d.jsonl").write_bytes(json_lines(["four"]))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"five"))
    (tmp_path / ".hidden/f.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with caplog.at_level("INFO", logger="moejax"):
        assert all_texts(tmp_path) == ["five", "four", "one", "three", "two"]
    assert (
        "left out 1 files that are no text, such as" in caplog.text and "image.png" in caplog.text
    )
    source = source_of(tmp_path)
    domains = {}
    for split in SPLITS:
        domains |= {document.text: document.domain for document in source.documents(split)}
    assert domains == {"one": "", "two": "", "five": "", "three": "news", "four": "news"}


def test_a_name_with_commas_or_signs_of_globs_is_that_file(tmp_path):
    folder = tmp_path / "d[1],x"
    folder.mkdir()
    (folder / "a*.txt").write_text("star")
    (folder / "ab.txt").write_text("other text")
    assert texts_of(folder / "a*.txt") == {"train": ["sta"], "validation": ["r"]}
    assert all_texts(folder) == ["other text", "star"]


def test_several_are_given_with_commas_and_each_file_counts_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert all_texts(f"{tmp_path}/*.txt, {tmp_path}/c.md,{tmp_path}/a.txt") == [
        "a.txt",
        "b.txt",
        "c.md",
    ]
    with pytest.raises(
        ConfigError, match=r"data\.files='.*/x\.txt' matches no file; give a file, a folder, a glob"
    ):
        all_texts(f"{tmp_path}/*.txt,{tmp_path}/x.txt")
    with pytest.raises(ConfigError, match=r"'gs://bucket/\*\.txt' is an address"):
        all_texts("gs://bucket/*.txt")


def write_parquet(path, texts, **more):
    columns = {"text": texts} | {name: [value] * len(texts) for name, value in more.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def test_documents_and_splits_are_the_same_in_every_format(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    wanted = texts_of(tmp_path / "*.txt")
    assert {split: len(texts) for split, texts in wanted.items()} != {"train": 40, "validation": 0}
    raw = json_lines(TEXTS)
    files = {
        "t.jsonl": raw,
        "t.json.gz": gzip.compress(raw),
        "t.jsonl.zst": compressed(raw, "zstd"),
        "crlf.jsonl": b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "t.parquet", TEXTS)
    for name in (*files, "t.parquet"):
        found = texts_of(tmp_path / name)
        for split in SPLITS:
            assert sorted(found[split]) == sorted(wanted[split]), name
        in_the_order_of_the_file = [text for text in TEXTS if text in wanted["train"]]
        assert found["train"] == in_the_order_of_the_file


def test_equal_documents_of_several_files_fall_into_the_same_split(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:25]))
    write_parquet(tmp_path / "b.parquet", TEXTS[10:])
    (tmp_path / "c.txt").write_text(TEXTS[3])
    found = texts_of(f"{tmp_path}/*")
    assert not set(found["train"]) & set(found["validation"])
    assert len(found["train"]) + len(found["validation"]) == 25 + 30 + 1


def test_names_and_domains_come_from_fields_or_from_the_file(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [
        {"text": "a", "name": "first", "domain": "x"},
        {"text": "bb", "name": 7},
        {"text": "ccc", "domain": None},
    ]
    (tmp_path / "in/t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = source_of(tmp_path)
    found = []
    for split in SPLITS:
        found += [(each.text, each.name, each.domain) for each in source.documents(split)]
    assert sorted(found) == [("a", "first", "x"), ("bb", "7", "in"), ("ccc", "t 3", "in")]


def test_the_field_of_the_text_is_chosen_and_part_of_the_identity(tmp_path):
    lines = [json.dumps({"text": f"t{i}", "body": f"b{i}"}) for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert all_texts(tmp_path / "t.jsonl", text_field="body") == ["b0", "b1", "b2", "b3"]
    files = str(tmp_path / "t.jsonl")
    assert source_of(files).identity != source_of(files, text_field="body").identity
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["x", "y"], "id": [1, 2]}), tmp_path / "t.parquet"
    )
    assert all_texts(tmp_path / "t.parquet", text_field="body") == ["x", "y"]


MISTAKES = {
    "no JSON": (b'{"text": "a"}\n{"text": "b"\n', r"t\.jsonl, line 2: no JSON .*column \d+"),
    "an array": (b'[{"text": "a"}]\n', r"line 1: a JSON array and no object"),
    "nested deeply": (b'{"text": "a"}\n\n' + b"[" * 100_000, r"line 3: no JSON"),
    "no field": (
        b'{"text": "a"}\n{"contents": "b", "id": 1}\n',
        r"line 2: no field 'text' but contents, id; the nearest is contents: "
        r"set data\.text_field=contents",
    ),
    "no text": (
        b'{"text": "a"}\n{"text": 3}\n',
        r"line 2: the field 'text' holds number and must be text",
    ),
    "null": (b'{"text": null}\n', r"line 1: the field 'text' holds null"),
    "no UTF-8": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: not UTF-8 text \(byte 24\)"),
    "half a character": (b'{"text": "a\\ud800"}\n', r"line 1: \\ud800 alone is no character"),
    "a nested domain": (
        b'{"text": "a", "domain": []}\n',
        r"line 1: the field 'domain' holds array",
    ),
    "only empty documents": (b'{"text": ""}\n', r"names no document with text"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_json_lines_is_named_by_file_and_line(tmp_path, content, message):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        all_texts(tmp_path / "t.jsonl")
    assert "\n" not in str(error.value)
    (tmp_path / "t.jsonl").unlink()
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=message.replace(r"jsonl", r"jsonl\.gz")):
        all_texts(tmp_path / "t.jsonl.gz")


def test_a_mistake_in_parquet_or_compression_is_named_by_file(tmp_path):
    write_parquet(tmp_path / "t.parquet", TEXTS)
    with pytest.raises(
        DataError, match=r"t\.parquet: no field 'body' but text; the nearest is text"
    ):
        all_texts(tmp_path / "t.parquet", text_field="body")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet, row 2: the field 'text' holds null"):
        all_texts(tmp_path / "null.parquet")
    raw = json_lines(TEXTS)
    damaged = {
        "a.parquet": (tmp_path / "t.parquet").read_bytes()[:-9],
        "b.parquet": b"no Parquet",
        "c.jsonl.gz": gzip.compress(raw)[:-3],
        "d.txt.gz": b"plain",
        "e.jsonl.zst": compressed(raw, "zstd")[:-3],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError, match=rf"{name} cannot be read \(.+\); leave it out of data\.files"
        ) as error:
            all_texts(tmp_path / name)
        assert "\n" not in str(error.value)


def test_empty_documents_are_counted_and_left_out(tmp_path, caplog):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "t.jsonl").write_bytes(json_lines(["", "a", "b", ""]))
    with caplog.at_level("WARNING", logger="moejax"):
        assert all_texts(f"{tmp_path}/*") == ["a", "b"]
    assert "3 of 5 documents are empty and left out; the first is number 1 of" in caplog.text


def test_a_split_by_keys_is_the_split_by_names():
    rng = np.random.default_rng(0)
    for number in (2, 3, 20, 200):
        sizes = {f"{number} {i}": int(size) for i, size in enumerate(rng.integers(1, 1000, number))}
        keys = np.array([split_key(name) for name in sizes], np.uint64)
        last = last_held_out(keys, np.array([*sizes.values()]))
        assert {name for name in sizes if split_key(name) <= last} == held_out(sizes)
        # Documents that occur twice count twice and stay together.
        last_of_pairs = last_held_out(np.repeat(keys, 2), np.ones(2 * number))
        assert 0 < np.count_nonzero(keys <= last_of_pairs) < number


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path, monkeypatch):
    # A small window is full at these sizes.
    monkeypatch.setattr("moejax.data.packing.WINDOW_SLOTS", 1 << 14)

    def peak(megabytes):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("wb") as file:
            for i in range(200 * megabytes):
                file.write(json_lines([f"{i} " + "abcdefgh" * 620]))
        data = DataConfig(
            source="files", files=str(path), directory=str(tmp_path / "data"), tokenizer="bytes"
        )
        data = dataclasses.replace(data, seq_len=512)
        tracemalloc.start()
        corpus = prepare(data)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(corpus.num_documents.values()) == 200 * megabytes
        return found

    peak(1)  # what is loaded once
    small, large = peak(2), peak(4)
    assert large < small + 700_000  # of 2 MB more
