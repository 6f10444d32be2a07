# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The ledger's file: connections, transactions and the schema they find."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.errors import PatchwiseError
from lib.ledger.records import Query, to_query
from lib.ledger.schema import SCHEMA_VERSION, prepare
from lib.storage.sqlite import log_ahead

BUSY_SECONDS = 30.0
JOURNAL = "journal.jsonl"


class LedgerError(PatchwiseError):
    """The ledger cannot be used as asked; the message says why."""


def damaged(path: Path, found: object) -> LedgerError:
    """What to say of a file that SQLite cannot mend."""
    return LedgerError(
        f"{path} is damaged ({' '.join(str(found).split())}); move it and the files {path.name}-wal and -shm away and "
        f"start again: the answers come back from {JOURNAL} and the raw files"
    )


class LeaseError(LedgerError):
    """A query is not this client's to act on."""

    status = 409


class LedgerStore:
    """An SQLite file in WAL mode; every method of its subclasses is one transaction.

    Any number of processes may hold one open: writers wait for each other, and a commit is on disk
    (`synchronous=FULL`) before the method returns. A file of an earlier version is brought up to date when it is
    opened, wholly or not at all.

    Args:
        path: the SQLite file; made when missing.
        clock: seconds since 1970, replaceable in tests.
        idle_minutes: longest time between two requests that counts as work.

    Raises:
        LedgerError: the file belongs to a newer version or is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, idle_minutes: float = 5) -> None:
        self.path = path
        self.clock = clock
        self.idle_minutes = idle_minutes
        self._kept: sqlite3.Connection | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._connect() as connection:
                log_ahead(connection, BUSY_SECONDS)
            with self._transaction() as connection:
                found = prepare(connection)
        except sqlite3.OperationalError:
            # Locked, read-only, no room: nothing is wrong with what is in the file.
            raise
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from error
        if found > SCHEMA_VERSION:
            raise LedgerError(f"{path} was written by a newer version (schema {found}); update this program")

    def stay_open(self) -> None:
        """Keeps the file open until the process ends: for a server, which does not fork.

        The last connection that is closed moves the log into the file; while this idle one is there, no call has to.
        """
        self._kept = self._kept or sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False)
        self._kept.execute("SELECT 1 FROM meta").fetchone()

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        # A connection a call: threads and forked children never share one, and opening costs a tenth of a millisecond.
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA synchronous=FULL")
            yield connection
        finally:
            connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                # A full disk makes SQLite roll back by itself; that must not hide what happened.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _queries(self, condition: str, values: tuple[Any, ...]) -> list[Query]:
        with self._connect() as connection:
            return [to_query(row) for row in connection.execute(f"SELECT * FROM queries WHERE {condition}", values)]

    def _note(
        self,
        connection: sqlite3.Connection,
        kind: str,
        client: str | None,
        *,
        query: int | None = None,
        answer: int | None = None,
        note: str | None = None,
    ) -> None:
        """Adds a line to the trail of what happened, which nothing ever changes or removes."""
        connection.execute(
            "INSERT INTO events (at, kind, query, answer, client, note) VALUES (?, ?, ?, ?, ?, ?)",
            (self.clock(), kind, query, answer, client, note),
        )
