"""Connects to the database of a search."""

from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from hf_peft_ext.validation.checks import check, check_writable


def connect(url: str, heartbeat: int, create: bool = True) -> RDBStorage:
    """Open a database and create missing tables.

    Optuna's JournalStorage is not used: it has no heartbeats, so the trial of a killed worker would run forever.

    Args:
        url: URL of the database, for SQLAlchemy.
        heartbeat: seconds between two heartbeats of a run; after three times as long without one, the run is lost.
        create: create a missing SQLite file.

    Raises:
        ValueError: `url` is not a database's URL, names no database, or its SQLite file cannot be used.
    """
    try:
        database = make_url(url)
    except ArgumentError:
        rule = 'must be a database\'s URL, such as "sqlite:///search.db"'
        raise ValueError(f"`storage` (={url!r}) {rule}.") from None
    is_sqlite = database.get_backend_name() == "sqlite"
    is_named = database.database not in (None, "", ":memory:")
    check("storage", url, is_named, "must name a file or a server's database; one in memory is lost with the process")
    if is_sqlite:
        file = Path(str(database.database))
        check("storage", url, file.parent.is_dir(), f"must be in an existing folder, unlike {file.parent}")
        check("storage", url, create or file.exists(), "must name an existing file")
        check_writable("storage", file.parent, url)  # in a read-only folder, FileLock waits forever
    with FileLock(f"{database.database}.lock") if is_sqlite else nullcontext():  # one worker creates the tables
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True},
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
        )
    if is_sqlite:
        serialize_transactions(storage)
    return storage


def serialize_transactions(storage: RDBStorage) -> None:
    """Begin each SQLite transaction as a write, so that transactions run one after the other.

    Servers lock the row of a trial. In SQLite, two workers could both read a trial as WAITING and take it.
    The two listeners are SQLAlchemy's recipe for SQLite.
    """
    storage.engine.dispose()  # connections that were opened without the listeners
    event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
