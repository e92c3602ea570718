"""Addresses of storages: paths of files, and URLs of databases, which may hold passwords.

Everything that shows, logs, writes or quotes an address goes through `show_storage`, and everything
that quotes what a driver said about one through `without_secrets`. Both show what is known to be
harmless, and nothing else: in an address that is not well formed, a password may be anywhere.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from moejax.extras import how_to_install
from moejax.sweeps.search.definition import StudyError

if TYPE_CHECKING:  # an extra, imported where it is needed
    from sqlalchemy import URL

JOURNALS = (".journal", ".log")
DATABASES = (".db",)
HIDDEN = "***"
MIN_SECRET = 4
"""Letters of a hidden piece, from which on it is replaced within words, too."""

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:")  # the beginning of a URL, well formed or not
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+_.-]*(?=:)")
_NO_SCHEME = re.compile(r"[^/]*@")  # USER:PASSWORD@HOST begins as a URL does
# In what looks like a path: USER:PASSWORD@HOST, or a URL without its scheme.
_CREDENTIALS = re.compile(r":[^/]*@|^//")
_HOST = re.compile(r"[\w.-]*|\[?[0-9A-Fa-f:.]+\]?")
_NAME = re.compile(r"[\w.+-]*")
_DATABASE = re.compile(r"[\w./ +-]*")


def is_path(storage: str) -> bool:
    """Whether an address is a path of a file, and neither a URL nor a malformed one."""
    return not _ADDRESS.match(storage) and not _CREDENTIALS.search(storage)


def show_storage(storage: str) -> str:
    """Returns a storage as it may be shown: a URL has neither its password nor its query."""
    if is_path(storage):
        return storage
    scheme = _SCHEME.match(storage)
    hidden = f"{scheme[0]}:{HIDDEN}" if scheme and not _NO_SCHEME.match(storage) else HIDDEN
    try:
        url = parse_address(storage)
    except StudyError:
        return hidden
    if url.get_backend_name() == "sqlite":
        if url.host is not None:
            return hidden
        return f"{url.drivername}:///{url.database or ''}{_hide_query(url)}"
    parts = [(_NAME, url.username), (_HOST, url.host), (_DATABASE, url.database)]
    for pattern, part in parts:
        if part is not None and not pattern.fullmatch(part):
            return hidden
    return _show_server(url)


def _show_server(url: "URL") -> str:
    """Returns a well-formed address of a server without its password and its query."""
    user = url.username or ""
    if url.password is not None:
        user += f":{HIDDEN}"
    shown = f"{url.drivername}://"
    if user:
        shown += f"{user}@"
    shown += url.host or ""
    if url.port is not None:
        shown += f":{url.port}"
    if url.database is not None:
        shown += f"/{url.database}"
    return shown + _hide_query(url)


def _hide_query(url: "URL") -> str:
    """Returns what stands for the query; its keys are hidden, too: a value may be read as a key."""
    return f"?{HIDDEN}" if url.query else ""


def without_secrets(text: str, storage: str) -> str:
    """Returns a message about a storage without the pieces that `show_storage` hides."""
    pieces = {*_pieces(storage), *_pieces(unquote(storage))}
    hidden = pieces - set(_pieces(show_storage(storage)))
    # The longest first, as one may be a part of another.
    for piece in sorted(hidden, key=len, reverse=True):
        pattern = re.escape(piece)
        if len(piece) < MIN_SECRET:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, HIDDEN, text)
    return text


def _pieces(address: str) -> list[str]:
    """Returns the words of a URL; none of a path."""
    if is_path(address):
        return []
    return [piece for piece in re.split(r"[:/@?&=;,{}\s'\"]+", address) if piece]


def parse_address(address: str) -> "URL":
    """Returns SQLAlchemy's URL of an address.

    Raises:
      StudyError: it is no URL, or that of a database that SQLAlchemy does not know.
    """
    try:
        import sqlalchemy
    except ImportError as error:
        raise StudyError(
            f"a search needs SQLAlchemy ({error}): {how_to_install('sweeps')}"
        ) from error
    scheme = _SCHEME.match(address)
    if scheme is None or not address.startswith(f"{scheme[0]}://"):
        raise StudyError(
            "the storage is no URL of the form postgresql+psycopg://user@host/name; write it so"
        )
    try:
        url = sqlalchemy.make_url(address)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StudyError(
            f"the storage that begins {scheme[0]}:// is no URL of the form "
            f"{scheme[0]}://user@host/name"
        ) from None  # its message may hold the password
    try:
        url.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        raise StudyError(
            f"storage {scheme[0]}:// is of no known kind; "
            "use postgresql+psycopg://, mysql+pymysql:// or sqlite:///"
        ) from None
    return url


def sqlite_address(path: Path) -> str:
    """Returns SQLAlchemy's URL of an SQLite file, from which the file's name can be read again.

    Raises:
      StudyError: this version of SQLAlchemy cannot write the name in a URL.
    """
    import sqlalchemy

    url = sqlalchemy.URL.create("sqlite", database=str(path))
    address = url.render_as_string(hide_password=False)
    if sqlalchemy.make_url(address).database != str(path):
        raise StudyError(
            f"storage {path} has a name that SQLAlchemy {sqlalchemy.__version__} cannot open; "
            "choose another"
        )
    return address


def is_address(word: str) -> bool:
    """Whether a word of a command line that is no flag may be a storage, which holds a password."""
    return re.search("[:@]", word.partition("=")[0]) is not None


def sqlite_path(storage: str) -> Path | None:
    """Returns the absolute path of an SQLite file; None for other storages."""
    if is_path(storage):
        return Path(storage).absolute() if storage.endswith(DATABASES) else None
    if not storage.startswith("sqlite"):
        return None
    database = parse_address(storage).database
    return Path(database).absolute() if database and database != ":memory:" else None


def journal_path(storage: str) -> Path | None:
    """Returns the absolute path of a journal; None for other storages."""
    is_journal = is_path(storage) and storage.endswith(JOURNALS)
    return Path(storage).absolute() if is_journal else None
