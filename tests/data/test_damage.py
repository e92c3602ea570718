"""Prepared data, each file damaged in eight ways: an error in one line, or equal rows."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cases.data_damage import WAYS, damage, restore
from cases.tfds import write_dataset
from moejax.config import ConfigError, DataConfig
from moejax.data import DataError, prepare
from moejax.data.packing import FEATURES
from moejax.data.sources.choose import open_source
from moejax.data.sources.foreign_dataset import open_dataset

SPLITS = ("train", "validation")
TRIES = {"bit": 6, "random": 2}  # these depend on chance


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents in JSON lines with names and domains, read by pieces that were learnt."""
    folder = tmp_path_factory.mktemp("damage")
    records = []
    for i in range(60):
        records.append({"text": "abc def ghi " * (3 + i), "name": f"n{i}", "domain": f"d{i % 3}"})
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "texts.jsonl").write_text("".join(lines))
    return DataConfig(
        source="files",
        files=str(folder / "texts.jsonl"),
        directory=str(folder / "data"),
        tokenizer="bpe",
        vocab_size=270,
        seq_len=32,
    )


def everything(data):
    """Returns all that reading prepared rows gives."""
    corpus = prepare(data)
    stacked = {}
    labels = {}
    for split in SPLITS:
        rows = corpus.rows(split)
        stacked[split] = [np.stack([row[name] for row in rows]) for name in FEATURES]
        labels[split] = dataclasses.astuple(corpus.labels(split))
    counts = (corpus.num_rows, corpus.num_tokens, corpus.num_bytes, corpus.num_documents)
    return stacked, labels, counts, corpus.tokenizer.fingerprint


def check(read, files, name):
    """Damages each file in each way; what is read then is an error in one line, or what it was."""
    wanted = read()
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "equal": 0}
    for path in files:
        raw = path.read_bytes()
        for how in WAYS:
            for _ in range(TRIES.get(how, 1)):
                damage(path, how, rng)
                try:
                    np.testing.assert_equal(read(), wanted, err_msg=f"{path} {how}")
                    outcomes["equal"] += 1
                except DataError as error:
                    assert "\n" not in str(error) and name in str(error), (path, how)
                    outcomes["refused"] += 1
                finally:
                    restore(path, raw)
    np.testing.assert_equal(read(), wanted)
    return outcomes


def test_damaged_rows_labels_and_tokenizers_are_refused_or_change_nothing(data):
    corpus = prepare(data)
    root = corpus.directory.parents[1]
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert {path.suffix.split("-")[0] for path in files} == {
        ".array_record",
        ".jsonl",
        ".json",
        ".model",
    }
    outcomes = check(lambda: everything(data), files, "remove the folder")
    assert outcomes["refused"] > 5 * len(files)


def test_damaged_documents_of_own_builders_are_refused_or_change_nothing(tmp_path):
    data = DataConfig(source="speeches", directory=str(tmp_path))

    def read():
        source = open_source(data)
        return {split: list(map(hash, source.documents(split))) for split in SPLITS}

    read()
    files = [path for path in sorted((tmp_path / "documents").rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"manifest.json", "dataset_info.json", "features.json"}
    assert check(read, files, "remove the folder")["refused"] > 5


def test_damaged_datasets_of_others_are_refused_in_one_line(tmp_path):
    data = write_dataset(
        tmp_path / "sets", {"train": [{"text": f"a{i}", "domain": "x"} for i in range(30)]}
    )
    folder = tmp_path / "sets/letters/1.2.0"
    rng = np.random.default_rng(1)
    for name in ("dataset_info.json", "features.json"):
        raw = (folder / name).read_bytes()
        for how in WAYS:
            damage(folder / name, how, rng)
            try:
                found = []
                for split in SPLITS:
                    found += [document.text for document in open_source(data).documents(split)]
                assert sorted(found) == sorted(f"a{i}" for i in range(30)), how
            except ValueError as error:
                assert type(error).__module__.startswith("moejax."), (name, how)
                assert "\n" not in str(error), (name, how)
            restore(folder / name, raw)


def test_classes_that_features_name_are_never_imported(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "sets", {"train": [{"text": f"a{i}"} for i in range(5)]})
    (tmp_path / "canary_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "sets/letters/1.2.0/features.json"
    text = path.read_text()
    for damaged in (
        text.replace("tensorflow_datasets.core.features.text_feature.Text", "canary_module.Text"),
        text.replace("pythonClassName", "python_class_name").replace(
            "tensorflow_datasets", "canary_module"
        ),
        '{"type": "canary_module.Features", "content": {}}',
        '{"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict", '
        '"content": {"type": "canary_module.X"}}',
        '{"x":' * 100_000,
    ):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"features\.json"):
            open_source(data)
    path.write_text(text)
    assert len([*open_source(data).documents("train")]) == 4


def test_a_dataset_is_checked_wherever_links_and_names_lead(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "sets", {"train": [{"text": f"a{i}"} for i in range(5)]})
    (tmp_path / "canary_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "sets/letters/1.2.0"
    good = (folder / "features.json").read_text()
    (folder / "features.json").write_text(good.replace("tensorflow_datasets", "canary_module"))
    payload = tmp_path / "sets/1.2.0"
    folder.rename(payload)
    folder.symlink_to("../1.2.0")
    with pytest.raises(
        DataError, match=r"letters/1.2.0/features\.json names the class 'canary_module"
    ):
        open_source(data)
    folder.unlink()
    (tmp_path / "sets/letters/.config").mkdir(exist_ok=True)
    (tmp_path / "sets/letters/.config/metadata.json").write_text('{"defaultConfigName": ".."}')
    for name in (
        "letters",
        "letters/..:1.2.0",
        "letters/..",
        "..",
        "letters/../letters",
        "kaggle:letters",
        "letters/",
    ):
        with pytest.raises(ConfigError, match=rf"data\.name='{re.escape(name)}' "):
            open_source(dataclasses.replace(data, name=name))


def test_the_requested_version_and_config_of_a_dataset_is_opened(tmp_path):
    data = write_dataset(tmp_path, {"train": [{"text": f"a{i}"} for i in range(5)]})
    folder = tmp_path / "letters"
    shutil.copytree(folder / "1.2.0", folder / "big/1.10.0")
    shutil.copytree(folder / "1.2.0", folder / "big/1.9.0")
    shutil.copytree(folder / "1.2.0", folder / "big/2.0.0-partial")

    def opened(name):
        path = Path(open_dataset(name, str(tmp_path)).builder.data_dir)
        return path.relative_to(folder).as_posix()

    for name in ("letters", "letters:1.*.*", "letters:1.2.0"):
        assert opened(name) == "1.2.0"
    assert opened("letters/big") == "big/1.10.0"
    assert opened("letters/big:1.9.0") == "big/1.9.0"
    shutil.rmtree(folder / "1.2.0")
    assert opened("letters") == "big/1.10.0"  # the only config
    shutil.copytree(folder / "big", folder / "small")
    for name in ("letters", "letters:1.9.0", "letters/big:1.2.0"):
        with pytest.raises(ConfigError, match="no such dataset, or one with several configs"):
            open_source(dataclasses.replace(data, name=name))


def test_leftovers_of_killed_preparations_are_removed(data, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    data = dataclasses.replace(data, directory=str(tmp_path / "data"))
    first = prepare(data)
    shutil.rmtree(first.directory)
    for name in (first.directory.name, "other-bytes259-8-0123456789ab"):
        leftover = first.directory.with_name(f"{name}.incomplete-0123abcd")
        leftover.mkdir()
        (leftover / "file").write_text("half")
    prepare(data)
    assert [*first.directory.parent.iterdir()] == [first.directory]
    speeches = open_source(DataConfig(source="speeches", directory=data.directory))
    assert next(speeches.documents("validation")).text
    assert [*temporary.iterdir()] == []
