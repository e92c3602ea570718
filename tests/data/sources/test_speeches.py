"""The default corpus, prepared once: real text, its splits, and what the tokenizer makes of it."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moejax.config import DataConfig
from moejax.data import TrainBatches, eval_batches, prepare
from moejax.data.sources.choose import open_source

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(directory=str(tmp_path_factory.mktemp("speeches")))


@pytest.fixture(scope="module")
def corpus(data):
    return prepare(data)


@pytest.fixture(scope="module")
def texts(data):
    source = open_source(data)
    return {split: [document.text for document in source.documents(split)] for split in SPLITS}


def test_complete_addresses_of_a_twentieth_of_the_bytes_are_held_out(corpus, texts):
    assert corpus.num_documents == {split: len(texts[split]) for split in SPLITS}
    assert sum(corpus.num_documents.values()) == 249
    assert not set(texts["train"]) & set(texts["validation"])
    assert corpus.num_bytes == {
        split: sum(len(text.encode()) for text in texts[split]) for split in SPLITS
    }
    assert 0.04 < corpus.num_bytes["validation"] / sum(corpus.num_bytes.values()) < 0.06


def test_addresses_are_a_dataset_with_names_years_and_parties(corpus, data):
    (folder,) = (corpus.directory.parents[1] / "documents").glob("speeches-*")
    by_name = {}
    for split in SPLITS:
        for example in tfds.data_source("speeches", data_dir=folder, split=split):
            by_name[example["name"]] = example
    lincoln = by_name[b"1863-Lincoln-1"]
    assert lincoln["year"] == 1863
    assert lincoln["president"] == b"Abraham Lincoln"
    assert lincoln["party"] == b"Republican"
    assert b"proclamation" in lincoln["text"]


def test_every_byte_of_validation_comes_back_from_its_batches(corpus, texts):
    ids = []
    for batch in eval_batches(corpus, 64):
        ids.append(batch.targets_BL[batch.loss_mask_BL])
    assert sum(map(len, ids)) == corpus.num_tokens["validation"]
    # Pieces are reordered by packing, so compare what does not depend on order: bytes, and ends of
    # documents.
    flat = np.concatenate(ids).tolist()
    num_bytes = 0
    for i in flat:
        piece = corpus.tokenizer.piece(i)
        if piece.startswith("<"):
            num_bytes += piece.startswith("<0x")
        else:
            num_bytes += len(corpus.tokenizer.decode([i]).encode())
    assert num_bytes == corpus.num_bytes["validation"]
    assert flat.count(corpus.tokenizer.eos_id) == corpus.num_documents["validation"]
    assert all(
        corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text
        for text in texts["validation"]
    )


def test_bpe_of_4096_reads_four_bytes_a_token_and_rows_are_nearly_full(corpus):
    assert corpus.tokenizer.vocab_size == 4096
    assert corpus.num_bytes["train"] / corpus.num_tokens["train"] > 4
    assert corpus.num_tokens["train"] / (256 * corpus.num_rows["train"]) > 0.99


def test_training_batches_are_english(corpus):
    batch = TrainBatches(corpus, 4, seed=0)[0]
    assert " the " in corpus.tokenizer.decode(batch.tokens_BL[0].tolist())


def test_opening_again_prepares_nothing(corpus, data, caplog, monkeypatch):
    def forbidden(*args):
        raise RuntimeError("nothing should be written")

    monkeypatch.setattr("moejax.data.storage.records.run_builder", forbidden)
    monkeypatch.setattr("moejax.data.rows.train_sentencepiece", forbidden)
    again = prepare(data)
    assert again.directory == corpus.directory
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    # A run that brings the same tokenizer along finds the same rows.
    assert prepare(data, tokenizer=corpus.tokenizer).directory == corpus.directory
