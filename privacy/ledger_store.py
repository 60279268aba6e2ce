"""The database of a privacy ledger: SQLite that is durable when a transaction returns, and only ever grows.

A connection lasts for one transaction. So it is always the file that now has the name that is read, a
connection never crosses a fork, and a thread needs no more than its own call.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from medfed.durable_file import sync_folder
from medfed.errors import LedgerError
from privacy.ledger_entry import Entry

BUSY_TIMEOUT_S = 60.0
"""How long to wait while another process writes; it may be computing an epsilon, which takes seconds."""

_APPEND_ONLY = "BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END"

_SCHEMA = {
    "entries": (
        "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL, "
        "signature BLOB NOT NULL) STRICT"
    ),
    "replies": "CREATE TABLE replies (reservation INTEGER PRIMARY KEY, reply BLOB NOT NULL) STRICT",
    "entries_keep": f"CREATE TRIGGER entries_keep BEFORE DELETE ON entries {_APPEND_ONLY}",
    "entries_stay": f"CREATE TRIGGER entries_stay BEFORE UPDATE ON entries {_APPEND_ONLY}",
}

# Cast, so that they are bytes whatever a damaged file makes SQLite take them for.
_ENTRIES = (
    "SELECT sequence, coalesce(CAST(body AS BLOB), x''), coalesce(CAST(digest AS BLOB), x''), "
    "coalesce(CAST(signature AS BLOB), x'') FROM entries"
)
_REPLIES = "SELECT reservation, coalesce(CAST(reply AS BLOB), x'') FROM replies"

_PRAGMAS = ("synchronous=EXTRA", "fullfsync=1", "secure_delete=ON", "trusted_schema=OFF")
"""Every commit is synced, the folder too; a reply that is replaced is overwritten with zeros."""


@contextmanager
def transaction(path: Path, *, write: bool) -> Generator[sqlite3.Connection, None, None]:
    """A transaction that is committed durably when the block ends, and undone when it raises.

    A writer holds the write lock from the start; a reader sees one state, and no commit ends before it does.

    Raises:
        LedgerError: if there is no database, it is not one, or the operating system refuses (disk full,
            read-only, locked): then the block has had no effect.
    """
    try:
        with closing(_connect(path, write=write)) as connection:
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from bytes in the text of an error
        raise LedgerError(
            f"Expected to {'write' if write else 'read'} the ledger {path}, got: {error}; "
            f"mend the disk, the rights or the file, and try again."
        ) from error


def _connect(path: Path, *, write: bool) -> sqlite3.Connection:
    # mode=rw never creates a file, and opens one that may only be read for reading. A reader, too, opens for
    # writing if it may, for only so can SQLite undo what a killed writer left half done.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    try:
        for pragma in _PRAGMAS if write else (*_PRAGMAS, "query_only=ON"):
            connection.execute(f"PRAGMA {pragma}")
        _require_journal(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_journal(connection: sqlite3.Connection) -> None:
    """With another journal mode a commit is not durable when it returns, or a reader could miss the head file."""
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != "delete":
        raise sqlite3.DatabaseError(f"journal mode {mode!r}, where a ledger has 'delete'")


def create_file(path: Path) -> None:
    """Make an empty database, mode 0600, if there is no file; what SQLite writes beside it gets the same mode."""
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        sync_folder(path.parent)


def has_schema(connection: sqlite3.Connection, path: Path) -> bool:
    """True for the tables and triggers of a ledger, False for a database without any.

    Raises:
        LedgerError: for any others, for example when a trigger that forbids changes was dropped.
    """
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master").fetchall())
    if found and found != _SCHEMA:
        changed = sorted(str(name) for name in {*found, *_SCHEMA} if found.get(name) != _SCHEMA.get(name))
        raise LedgerError(
            f"Expected the tables and triggers of a ledger in {path}, got other ones ({', '.join(changed)}): "
            f"it is no ledger, or it was changed; train nothing with it and restore the newest true copy."
        )
    return bool(found)


def create_schema(connection: sqlite3.Connection) -> None:
    """Make the tables and triggers of a ledger."""
    for statement in _SCHEMA.values():
        connection.execute(statement)


def count_entries(connection: sqlite3.Connection) -> int:
    """Number of rows, whatever their sequence."""
    (count,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    return int(count)


def entries_from(connection: sqlite3.Connection, first: int | None) -> Generator[Entry, None, None]:
    """Entries in order of sequence, from ``first`` on; None for all of them, wherever they begin."""
    where, values = ("", ()) if first is None else (" WHERE sequence >= ?", (first,))
    for row in connection.execute(f"{_ENTRIES}{where} ORDER BY sequence", values):
        yield Entry(*row)


def append_entry(connection: sqlite3.Connection, entry: Entry) -> None:
    """Append one entry; part of the transaction."""
    connection.execute(
        "INSERT INTO entries VALUES (?, ?, ?, ?)", (entry.sequence, entry.body, entry.digest, entry.signature)
    )


def stored_replies(connection: sqlite3.Connection) -> dict[int, bytes]:
    """Every stored reply, by the sequence of its reservation."""
    return dict(connection.execute(_REPLIES).fetchall())


def read_reply(connection: sqlite3.Connection, reservation: int) -> bytes | None:
    """The stored reply of a reservation."""
    row = connection.execute(f"{_REPLIES} WHERE reservation = ?", (reservation,)).fetchone()
    return None if row is None else bytes(row[1])


def replace_reply(connection: sqlite3.Connection, old: int | None, reservation: int, reply: bytes) -> None:
    """Store a reply in place of the one of reservation ``old``; part of the transaction."""
    connection.execute("DELETE FROM replies WHERE reservation IS ?", (old,))
    connection.execute("INSERT INTO replies VALUES (?, ?)", (reservation, reply))
