# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The ledger's file: connections, transactions and the schema they find."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.errors import PatchwiseError
from lib.ledger.journal import Journal
from lib.ledger.records import Query, to_query
from lib.ledger.schema import SCHEMA_VERSION, prepare
from lib.storage.sqlite import log_ahead

logger = logging.getLogger(__name__)

# Values of a statement, by position or by name.
Values = tuple[Any, ...] | dict[str, Any]

BUSY_SECONDS = 30.0
JOURNAL = "journal.jsonl"


class LedgerError(PatchwiseError):
    """The ledger cannot be used as requested; the message contains the reason."""


def damaged(path: Path, found: object) -> LedgerError:
    """Error for a file that SQLite cannot repair."""
    return LedgerError(
        f"{path} is damaged ({' '.join(str(found).split())}); move it and the files {path.name}-wal and -shm away and "
        f"start again: the answers come back from {JOURNAL} and the raw files"
    )


class LeaseError(LedgerError):
    """The client must not act on a query."""

    status = 409


class LedgerStore:
    """An SQLite file in WAL mode and the journal beside it; every method of its users is one transaction.

    Any number of processes may hold one open: writers wait for each other, and a commit is on disk
    (`synchronous=FULL`) before the method returns. A file of an earlier version is migrated when it is opened, as a
    whole or not at all.

    Args:
        path: the SQLite file; created if it is missing.
        clock: seconds since 1970, replaceable in tests.

    Raises:
        LedgerError: the file belongs to a newer version or is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.clock = clock
        self._kept: sqlite3.Connection | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.connect() as connection:
                log_ahead(connection, BUSY_SECONDS)
            with self.transaction() as connection:
                found = prepare(connection)
        except sqlite3.OperationalError:
            # Locked, read-only or full disk: the content of the file is intact.
            raise
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        if found > SCHEMA_VERSION:
            raise LedgerError(f"{path} was written by a newer version (schema {found}); update this program")

    @property
    def journal(self) -> Journal:
        """The ledger's second record (see `Journal`), beside its file."""
        return Journal(self.path.with_name(JOURNAL))

    def stay_open(self) -> None:
        """Keep the file open until the process ends: for a server, which does not fork.

        The last connection that is closed moves the log into the file; this idle one prevents that during calls.
        """
        self._kept = self._kept or sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False)
        self._kept.execute("SELECT 1 FROM meta").fetchone()

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading, closed at the end of the block."""
        # A connection per call: threads and forked children never share one, and opening costs a tenth of a
        # millisecond.
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA synchronous=FULL")
            yield connection
        finally:
            connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are committed at the end of the block, or rolled back with an error."""
        with self.connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                # On a full disk, SQLite rolls back by itself; the second rollback must not hide the error.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def queries(self, condition: str, values: Values = ()) -> list[Query]:
        """Queries that meet an SQL condition, in the order it names."""
        with self.connect() as connection:
            return [to_query(row) for row in connection.execute(f"SELECT * FROM queries WHERE {condition}", values)]

    def write_down(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add committed lines to the journal; after a disk error the next start adds them."""
        try:
            self.journal.append(list(entries))
        except OSError as error:
            logger.warning("%s: not written (%s); the ledger has it", self.journal.path, error)

    def note(
        self,
        connection: sqlite3.Connection,
        kind: str,
        client: str | None,
        *,
        query: int | None = None,
        answer: int | None = None,
        note: str | None = None,
    ) -> None:
        """Add a line to the audit trail, which is append-only."""
        connection.execute(
            "INSERT INTO events (at, kind, query, answer, client, note) VALUES (?, ?, ?, ?, ?, ?)",
            (self.clock(), kind, query, answer, client, note),
        )
