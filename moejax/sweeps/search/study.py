"""Where a search keeps its study: a journal, an SQLite file, or a database that machines share.

Every storage keeps only JSON, numbers and strings, so reading a study of others runs no code of
theirs: Optuna pickles snapshots of a journal in Redis only, which is not offered here.
"""

import contextlib
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moejax.extras import how_to_install
from moejax.sweeps.search.definition import Definition, StudyError
from moejax.sweeps.search.storage_address import (
    is_path,
    journal_path,
    parse_address,
    show_storage,
    sqlite_address,
    sqlite_path,
    without_secrets,
)

if TYPE_CHECKING:  # an extra, imported where it is needed
    import optuna

ATTRIBUTE = "moejax"
"""The study's user attribute that holds its definition."""

CONNECT_TIMEOUT_S = 10

LOCK_TIMEOUT_S = 60
"""Seconds that SQLite waits while other workers write."""

JOURNAL_LOCK_S = 15
"""Seconds after which a journal's lock counts as left by a dead worker."""

MAX_ATTEMPTS = 5
"""To open a database: several workers may make its tables at once, and all but one fail."""


def load_optuna() -> ModuleType:
    """Returns Optuna, which reports only warnings.

    Raises:
      StudyError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise StudyError(f"a search needs Optuna ({error}): {how_to_install('sweeps')}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def create_study(storage: str, name: str, definition: Definition) -> "optuna.Study":
    """Returns the study `name`, which minimises its objective.

    A study that does not exist is made; one that exists may get more trials.

    Args:
      storage: a path that ends in .journal or .log (a journal), one in .db (SQLite), or a URL
        of SQLAlchemy.
      name: of the study within the storage.
      definition: what is searched, kept in the study for its workers.

    Raises:
      StudyError: Optuna or a driver is missing, the storage cannot be used, or the study searches
        something else or has more trials.
    """
    optuna = load_optuna()
    with storage_errors(storage):
        study = optuna.create_study(
            storage=_open_storage(storage, create=True),
            study_name=name,
            direction="minimize",
            load_if_exists=True,
        )
        # The trials are read first: who makes a study sets the attribute before its first trial.
        has_trials = bool(study.get_trials(deepcopy=False))
        if ATTRIBUTE not in study.user_attrs:
            if has_trials or study.directions != [optuna.study.StudyDirection.MINIMIZE]:
                raise _not_ours(study)
            study.set_user_attr(ATTRIBUTE, definition.to_json())
        known = definition_of(study)
        differing = known.differing(definition)
        if differing == ["trials"] and definition.trials > known.trials:
            study.set_user_attr(ATTRIBUTE, definition.to_json())
            differing = []
    if differing == ["trials"]:
        raise StudyError(
            f"study {name!r} in {show_storage(storage)} has trials={known.trials}, "
            f"which may only rise, not to {definition.trials}; "
            f"give --trials={known.trials} or more, or choose another --study"
        )
    if differing:
        raise StudyError(
            f"study {name!r} in {show_storage(storage)} has another {', '.join(differing)}; "
            "choose another --study, or go on with the one that is there: moejax sweep worker"
        )
    return study


def open_study(storage: str, name: str) -> "optuna.Study":
    """Returns the existing study `name`; arguments as of `create_study`.

    Raises:
      StudyError: Optuna or a driver is missing, or the storage has no such study of moejax.
    """
    optuna = load_optuna()
    shown = show_storage(storage)
    missing = StudyError(
        f"there is no study {name!r} in {shown}; moejax sweep --study={name} makes it"
    )
    if not _may_exist(storage):  # opening would make it
        raise missing
    with storage_errors(storage, no_tables=missing):
        try:
            study = optuna.load_study(study_name=name, storage=_open_storage(storage, create=False))
        except KeyError as error:
            raise missing from error
        definition_of(study)
    return study


def _may_exist(storage: str) -> bool:
    """Whether a storage is a database that must be asked, or a file that exists."""
    path = sqlite_path(storage) or journal_path(storage)
    return path is None or path.is_file()


def definition_of(study: "optuna.Study") -> Definition:
    """Returns what a study searches.

    Raises:
      StudyError: the study was not made by moejax.
    """
    content = study.user_attrs.get(ATTRIBUTE)
    if content is None:
        raise _not_ours(study)
    return Definition.from_json(content)


def _not_ours(study: "optuna.Study") -> StudyError:
    return StudyError(
        f"study {study.study_name!r} was not made by moejax sweep; choose another --study"
    )


@contextlib.contextmanager
def storage_errors(storage: str, no_tables: StudyError | None = None) -> Iterator[None]:
    """Turns errors of a storage into one line, without SQL and without a password.

    Args:
      storage: its address, or words for it.
      no_tables: raised where the database is reached and has no tables of Optuna.

    Raises:
      StudyError: instead of the error.
    """
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause: BaseException | None = error
        if isinstance(error, optuna.exceptions.StorageInternalError):
            cause = error.__cause__
        if no_tables is not None and _has_no_tables(cause):
            raise no_tables from error
        message = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()[0]
        raise StudyError(
            f"storage {show_storage(storage)} cannot be used "
            f"({without_secrets(message, storage)}); "
            "is the server up and the address right?"
        ) from None  # what the driver raised may quote the address


def dashboard_command(storage: str, host: str = "127.0.0.1", port: int = 8080) -> str:
    """Returns the command line that shows a storage's studies in a browser.

    A password is hidden, for the reader to fill in.
    """
    path = sqlite_path(storage)
    address = sqlite_address(path) if path is not None else show_storage(storage)
    return f"optuna-dashboard {shlex.quote(address)} --host {host} --port {port}"


def serve_dashboard(storage: str, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serves the studies of a storage to browsers of this machine until it is interrupted.

    Raises:
      StudyError: the dashboard is not installed, or the storage holds no study or cannot be used.
    """
    load_optuna()
    try:
        from optuna_dashboard import run_server
    except ImportError as error:
        raise StudyError(
            f"the dashboard is not installed ({error}): {how_to_install('sweeps')}"
        ) from error
    shown = show_storage(storage)
    missing = StudyError(
        f"there is no study in {shown}; moejax sweep --search=... --storage={shown} makes one"
    )
    if not _may_exist(storage):  # opening would make it
        raise missing
    with storage_errors(storage, no_tables=missing):
        opened = _open_storage(storage, create=False)
        if not opened.get_all_studies():
            raise missing
    run_server(opened, host=host, port=port)


def _open_storage(storage: str, create: bool) -> "optuna.storages.BaseStorage":
    """Returns the storage of a path or URL.

    Args:
      storage: its address.
      create: whether to make the tables of a database where they are missing.
    """
    if not is_path(storage):
        return _open_database(storage, create)
    sqlite = sqlite_path(storage)
    if sqlite is not None:
        return _open_database(sqlite_address(sqlite), create)
    path = journal_path(storage)
    if path is None:
        raise StudyError(
            f"storage {show_storage(storage)!r} must end in .journal, .log or .db, "
            "or be a URL such as postgresql+psycopg://host/name"
        )
    return _open_journal(storage, path)


def _open_journal(storage: str, path: Path) -> "optuna.storages.BaseStorage":
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An absolute path: the age of a lock, a symbolic link, is read through it.
        lock = JournalFileSymlinkLock(str(path), grace_period=JOURNAL_LOCK_S)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise StudyError(
            f"storage {storage} cannot be opened ({error.strerror}); choose another path"
        ) from error
    except Exception as error:  # Optuna reads the lines as its own, and raises anything for others
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StudyError(
            f"storage {storage} is no journal of Optuna, or damaged ({reason}); "
            "restore it, or choose another path"
        ) from error


def _open_database(address: str, create: bool) -> "optuna.storages.BaseStorage":
    """Returns a database's storage.

    Each of its operations is one transaction, which no transaction of another worker can split.
    """
    url = parse_address(address)
    is_sqlite = url.get_backend_name() == "sqlite"
    timeout = {"connect_timeout": CONNECT_TIMEOUT_S}
    if is_sqlite:
        timeout = {"timeout": LOCK_TIMEOUT_S}
    if is_sqlite and create and url.database:
        _make_parent(address, Path(url.database))
    # With `pool_pre_ping` a restarted server is connected to again.
    options = {"pool_pre_ping": True, "connect_args": timeout}
    storage = _connect(address, options, create)
    if is_sqlite:
        _lock_on_begin(storage.engine)
    return storage


def _make_parent(address: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"storage {show_storage(address)} cannot be made ({error.strerror}); "
            "choose another path"
        ) from error


def _connect(address: str, options: dict[str, Any], create: bool) -> "optuna.storages.RDBStorage":
    """Connects to a database, and tries again where another worker makes its tables meanwhile."""
    import sqlalchemy
    from optuna.storages import RDBStorage

    template = address.replace("{", "{{").replace("}", "}}")  # Optuna formats the address
    attempt = 1
    while True:
        try:
            return RDBStorage(template, engine_kwargs=options, skip_table_creation=not create)
        except ImportError as error:
            reason = without_secrets(str(error.__cause__ or error), address)
            raise StudyError(
                f"storage {show_storage(address)} needs a driver that is not installed ({reason}); "
                "that of postgresql+psycopg:// comes with extra sweeps: "
                f"{how_to_install('sweeps')}"
            ) from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            if not create or not _is_race(error) or attempt == MAX_ATTEMPTS:
                raise
            time.sleep(0.1 * attempt)
            attempt += 1


def _lock_on_begin(engine: "Any") -> None:
    """Makes SQLite's transactions take the write lock when they begin.

    The driver begins a transaction at the first write, so that two workers could both read
    "running" and both write "failed".
    """
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def disable_driver_transactions(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # closes the connections that were opened before


def _has_no_tables(error: BaseException | None) -> bool:
    """Whether a database was reached that has no tables of Optuna."""
    messages = r"no such table|relation \".*\" does not exist|Table .* doesn't exist"
    return re.search(messages, str(error)) is not None


def _is_race(error: BaseException) -> bool:
    """Whether another process made the same table or row at the same time."""
    return re.search(r"already exists|unique|duplicate", str(error), re.IGNORECASE) is not None
