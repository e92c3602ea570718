"""Where a search keeps its study: a journal file, an SQLite file, or a database that many machines reach.

Every storage keeps JSON, numbers and strings alone, so reading a study of others runs nothing of
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

ATTRIBUTE = "moejax"  # the study's user attribute that holds its definition
CONNECT_TIMEOUT_S = 10
LOCK_TIMEOUT_S = 60  # of SQLite, while other workers write
JOURNAL_LOCK_S = 15  # after which a journal's lock counts as left by a dead worker
CREATORS_RACE = (
    5  # several workers may make a database's tables at once; all but one fail and try again
)


def load_optuna() -> ModuleType:
    """Optuna, told to report warnings only.

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
    """The study `name`, which minimises its objective, made where it does not exist; one that does may get more trials.

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
        has_trials = bool(study.get_trials(deepcopy=False))
        if (
            ATTRIBUTE not in study.user_attrs
        ):  # asked after its trials: who makes a study sets it before the first
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
            f"study {name!r} in {show_storage(storage)} has trials={known.trials}, which may only rise, not to "
            f"{definition.trials}; give --trials={known.trials} or more, or choose another --study"
        )
    if differing:
        raise StudyError(
            f"study {name!r} in {show_storage(storage)} has another {', '.join(differing)}; "
            "choose another --study, or go on with the one that is there: moejax sweep worker"
        )
    return study


def open_study(storage: str, name: str) -> "optuna.Study":
    """The existing study `name`; arguments as of `create_study`.

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
    """Whether a storage is a database that has to be asked, or a file that is there."""
    path = sqlite_path(storage) or journal_path(storage)
    return path is None or path.is_file()


def definition_of(study: "optuna.Study") -> Definition:
    """What a study searches.

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
        cause = (
            error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        )
        if no_tables is not None and _has_no_tables(cause):
            raise no_tables from error
        said = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()[0]
        raise StudyError(
            f"storage {show_storage(storage)} cannot be used ({without_secrets(said, storage)}); is the server up and "
            "the address right?"
        ) from None  # what the driver raised may quote the address


def dashboard_command(storage: str, host: str = "127.0.0.1", port: int = 8080) -> str:
    """The command line that shows a storage's studies in a browser; a password is left to the reader to fill in."""
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
    """The storage behind a path or URL; with `create` its tables are made where they are missing."""
    sqlite = sqlite_path(storage) if is_path(storage) else None
    if sqlite is not None:
        return _open_database(sqlite_address(sqlite), create)
    if not is_path(storage):
        return _open_database(storage, create)
    path = journal_path(storage)
    if path is None:
        raise StudyError(
            f"storage {show_storage(storage)!r} must end in .journal, .log or .db, or be a URL such as "
            "postgresql+psycopg://host/name"
        )
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
            f"storage {storage} is no journal of Optuna, or damaged ({reason}); restore it, or choose another path"
        ) from error


def _open_database(address: str, create: bool) -> "optuna.storages.BaseStorage":
    """A database's storage, each of whose operations is one transaction that no other worker's can split."""
    import sqlalchemy
    from optuna.storages import RDBStorage

    url = parse_address(address)
    options: dict[str, Any] = {"pool_pre_ping": True}  # a restarted server is connected to again
    is_sqlite = url.get_backend_name() == "sqlite"
    options["connect_args"] = (
        {"timeout": LOCK_TIMEOUT_S} if is_sqlite else {"connect_timeout": CONNECT_TIMEOUT_S}
    )
    if is_sqlite and create and url.database:
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(
                f"storage {show_storage(address)} cannot be made ({error.strerror}); choose another path"
            ) from error
    template = address.replace("{", "{{").replace("}", "}}")  # Optuna formats the address
    for attempt in range(CREATORS_RACE):
        try:
            storage = RDBStorage(template, engine_kwargs=options, skip_table_creation=not create)
            break
        except ImportError as error:
            reason = without_secrets(str(error.__cause__ or error), address)
            raise StudyError(
                f"storage {show_storage(address)} needs a driver that is not installed ({reason}); "
                f"that of postgresql+psycopg:// comes with extra sweeps: {how_to_install('sweeps')}"
            ) from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            if not create or not _is_race(error) or attempt == CREATORS_RACE - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
    if is_sqlite:
        _serialise(storage.engine)
    return storage


def _serialise(engine: "Any") -> None:
    """Makes SQLite's transactions take the write lock when they begin.

    The driver begins one at the first write, so that two workers could both read "running" and both
    write "failed".
    """
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections opened before


def _has_no_tables(error: BaseException | None) -> bool:
    """Whether a database was reached that has no tables of Optuna."""
    return (
        re.search(
            r"no such table|relation \".*\" does not exist|Table .* doesn't exist", str(error)
        )
        is not None
    )


def _is_race(error: BaseException) -> bool:
    """Whether another process made the same table or row at the same time."""
    return re.search(r"already exists|unique|duplicate", str(error), re.IGNORECASE) is not None
