"""Labels of documents: written next to the rows, read back, and few enough for a loss of each."""

import dataclasses

import numpy as np
import pytest

from cases.tfds import write_dataset
from moejax.data import DataError, eval_batches, prepare
from moejax.data.labels import Labels, LabelsFile, read_labels
from moejax.data.sources.choose import Document

DOCUMENTS = [
    Document("aaa", "first", "x"),
    Document("bb", "second", "y"),
    Document("cccccc", "third", "x"),
    Document("d", "", ""),
]


def write(folder, documents, split="validation"):
    with LabelsFile(folder, split) as file:
        assert list(file.noting(iter(documents))) == documents


def test_labels_come_back_in_order(tmp_path):
    write(tmp_path, DOCUMENTS)
    labels = read_labels(tmp_path, "validation", 4)
    assert labels.names == ("first", "second", "third", "")
    assert labels.domains == ("", "x", "y")
    assert [labels.domains[i] for i in labels.domain_of_document] == ["x", "y", "x", ""]


def test_documents_without_labels_need_no_file_and_keep_their_place(tmp_path):
    write(tmp_path, [Document("a"), Document("b")])
    assert list(tmp_path.iterdir()) == []
    labels = read_labels(tmp_path, "validation", 2)
    assert labels.names == ()
    assert labels.domains == ("",)
    assert labels.domain_of_document.tolist() == [0, 0]
    write(tmp_path, [Document("a"), Document("b", "late", "x")], "train")
    assert read_labels(tmp_path, "train", 2).names == ("", "late")


@pytest.mark.parametrize("damage", ['["a", "b"]\n', "[1]\n" * 4, "no JSON\n" * 4])
def test_a_damaged_file_is_an_error_that_names_it_and_the_remedy(tmp_path, damage):
    write(tmp_path, DOCUMENTS)
    (tmp_path / "documents.validation.jsonl").write_text(damage)
    with pytest.raises(
        DataError, match=r"documents\.validation\.jsonl is damaged .*remove the folder"
    ):
        read_labels(tmp_path, "validation", 4)


def test_the_smallest_of_many_domains_become_one():
    # a has 1 document, b has 3, c and d have 2: the two with most are kept, the first of equals.
    labels = Labels((), ("a", "b", "c", "d"), np.array([0, 1, 1, 1, 2, 2, 3, 3], np.int32))
    fewer = labels.largest(3)
    assert fewer.domains == ("b", "c", "other")
    assert fewer.domain_of_document.tolist() == [2, 0, 0, 0, 1, 1, 2, 2]
    assert labels.largest(4) is labels


def test_a_domain_named_other_joins_the_other_domains():
    labels = Labels((), ("a", "other", "z"), np.array([0, 1, 1, 1, 2, 0], np.int32))
    fewer = labels.largest(2)
    assert fewer.domains == ("a", "other")
    assert fewer.domain_of_document.tolist() == [0, 1, 1, 1, 1, 0]


def test_a_corpus_knows_the_domain_of_every_token(tmp_path):
    texts = {"x": "abcdefgh" * 5, "y": "ABCDEFGH" * 3}
    examples = []
    for i in range(6):
        domain = "xy"[i % 2]
        examples.append({"text": texts[domain], "domain": domain, "name": i})
    data = write_dataset(tmp_path / "sets", {"train": examples, "validation": examples})
    data = dataclasses.replace(data, directory=str(tmp_path / "data"))
    corpus = prepare(dataclasses.replace(data, tokenizer="bytes", seq_len=16))
    labels = corpus.labels("validation")
    assert labels.domains == ("x", "y") and labels.names == tuple("012345")
    seen = 0
    for batch in eval_batches(corpus, 4):
        is_letter = batch.tokens_BL >= 3  # no special id
        is_lower = batch.tokens_BL - 3 >= ord("a")
        domains = np.array(labels.domains)[labels.domain_of_document[batch.documents_BL]]
        expected = np.where(is_lower, "x", "y")
        assert (domains == expected)[is_letter].all()
        assert (batch.documents_BL[batch.segments_BL == 0] == -1).all()
        seen += is_letter.sum()
    assert seen > 150
