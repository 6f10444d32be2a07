# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Start-up recovery: the ledger's missing entries are restored from the journal, and the journal's from the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.ledger.journal import Journal
from lib.ledger.records import ANSWERED, EXPIRED
from lib.ledger.store import LedgerStore, damaged
from lib.storage.atomic_files import file_digest

_SWITCHES = ("withdrawn", "restored")


@dataclass(frozen=True)
class Recovered:
    """Entries that `recover` restored: answers, and answers whose withdrawal or restoration had been lost.

    `gone` are raw files in the journal that are missing in both the ledger and the folder.
    """

    answers: list[int] = field(default_factory=list)
    switched: list[int] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


class Recovery:
    """The ledger's second record (see `Journal`), written after a commit and before the response to the client.

    Lines: `{"answer": row, "answered": rows, "queries": rows, "agreement": rows}`, `{"switch": raw file, "active":
    bool, "note": reason}`, and `{"query": number}`, the highest number assigned to a region. A number that a client
    may still hold must not be assigned to another region.
    """

    def __init__(self, store: LedgerStore) -> None:
        self.store = store

    def recover(self, raw: Path) -> Recovered:
        """Bring ledger and journal to the same state, at the start of a server and before any query or submission.

        An answer that is only in the journal is recorded again if its raw file is the submitted one. An answer that is
        only in the ledger is added to the journal, as are the answers of folders older than the journal. For an answer
        that was withdrawn or restored, the record with more such steps is right.

        Args:
            raw: folder of the raw files.

        Raises:
            LedgerError: the ledger's file is damaged and SQLite cannot repair it.
        """
        self._check_pages()
        journal, found = self.store.journal, Recovered()
        answers, switches, highest = _sorted_out(journal)
        with self.store.transaction() as connection:
            known = {row["raw"]: row for row in connection.execute("SELECT * FROM answers")}
            for name, entry in answers.items():
                if name not in known:
                    number = _put_back(connection, entry, raw / name)
                    if number is None:
                        found.gone.append(name)
                        continue
                    self.store.note(connection, "recovered", entry["answer"]["client"], answer=number)
                    found.answers.append(number)
            _reserve(connection, highest)
            switched = _switched(connection)
            for row in connection.execute("SELECT id, raw FROM answers").fetchall():
                steps = switches.get(row["raw"], [])[switched.get(row["id"], 0) :]
                self._switch_again(connection, row["id"], steps)
                if steps:
                    found.switched.append(row["id"])
            missing = [entry_of(connection, row["id"]) for name, row in known.items() if name not in answers]
            for row in connection.execute("SELECT id, raw, active FROM answers").fetchall():
                lacking = switched.get(row["id"], 0) - len(switches.get(row["raw"], []))
                missing += [{"switch": row["raw"], "active": bool(row["active"]), "note": None}] * lacking
        self.store.write_down(missing)
        return found

    def _check_pages(self) -> None:
        try:
            with self.store.connect() as connection:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            raise damaged(self.store.path, found)

    def _switch_again(self, connection: sqlite3.Connection, answer: int, steps: Sequence[Mapping[str, Any]]) -> None:
        for step in steps:
            switch(connection, answer, bool(step["active"]))
            self.store.note(connection, _SWITCHES[bool(step["active"])], None, answer=answer, note=step.get("note"))


def switch(connection: sqlite3.Connection, answer: int, active: bool) -> None:
    """Withdraw an answer from its image's label, or restore it, and update the status of its queries."""
    connection.execute("UPDATE answers SET active = ? WHERE id = ?", (int(active), answer))
    connection.execute(
        "UPDATE queries SET status = ? WHERE id IN (SELECT query FROM answered WHERE answer = ?)"
        " AND (? OR NOT EXISTS (SELECT 1 FROM answered JOIN answers ON answers.id = answered.answer"
        " WHERE answered.query = queries.id AND answers.active = 1))",
        (ANSWERED if active else EXPIRED, answer, active),
    )
    connection.execute("UPDATE merged SET answer = 0 WHERE image = (SELECT image FROM answers WHERE id = ?)", (answer,))


def entry_of(connection: sqlite3.Connection, answer: int) -> dict[str, Any]:
    """The journal's line of an answer: everything that the ledger has of it."""

    def rows(statement: str) -> list[dict[str, Any]]:
        return [dict(row) for row in connection.execute(statement, (answer,))]

    (row,) = rows("SELECT * FROM answers WHERE id = ?")
    return {
        # The later steps determine whether it is active.
        "answer": {**row, "active": 1},
        "answered": rows("SELECT * FROM answered WHERE answer = ? ORDER BY rowid"),
        "queries": rows("SELECT * FROM queries WHERE id IN (SELECT query FROM answered WHERE answer = ?)"),
        "agreement": rows("SELECT * FROM agreement WHERE answer = ? ORDER BY rowid"),
    }


def _sorted_out(journal: Journal) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]], int]:
    """Answers and steps by raw file, and the highest number of a query."""
    answers: dict[str, dict[str, Any]] = {}
    switches: dict[str, list[dict[str, Any]]] = {}
    highest = 0
    for entry in journal.entries():
        if "answer" in entry:
            answers.setdefault(entry["answer"]["raw"], entry)
        elif "switch" in entry:
            switches.setdefault(entry["switch"], []).append(entry)
        else:
            highest = max(highest, int(entry.get("query", 0)))
    return answers, switches, highest


def _put_back(connection: sqlite3.Connection, entry: Mapping[str, Any], raw: Path) -> int | None:
    """Record an answer again; return its number, or None if its raw file is missing."""
    if not raw.is_file() or file_digest(raw) != entry["answer"]["raw_sha256"]:
        return None
    numbers = {row["id"]: _put_query(connection, row) for row in entry["queries"]}
    answer = dict(entry["answer"])
    if connection.execute("SELECT 1 FROM answers WHERE id = ?", (answer["id"],)).fetchone():
        del answer["id"]
    number = int(_insert(connection, "answers", answer) or 0)
    for row in entry["answered"]:
        _insert(connection, "answered", {**row, "answer": number, "query": numbers.get(row["query"])})
    for row in entry["agreement"]:
        if connection.execute("SELECT 1 FROM answers WHERE id = ?", (row["other"],)).fetchone():
            _insert(connection, "agreement", {**row, "answer": number})
    for query in numbers.values():
        connection.execute("UPDATE queries SET status = ? WHERE id = ?", (ANSWERED, query))
    return number


def _put_query(connection: sqlite3.Connection, lost: Mapping[str, Any]) -> int:
    """The number of an answered query, which is the one it had unless another region has it now."""
    place = ("image", "x", "y", "z", "dx", "dy", "dz")
    row = connection.execute("SELECT * FROM queries WHERE id = ?", (lost["id"],)).fetchone()
    if row is not None and all(row[name] == lost[name] for name in place):
        return int(lost["id"])
    content = dict(lost) if row is None else {name: value for name, value in lost.items() if name != "id"}
    return int(_insert(connection, "queries", content) or 0)


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int | None:
    """Insert the values that the table has columns for, since a line may be of an earlier version."""
    columns = [column["name"] for column in connection.execute(f"PRAGMA table_info({table})") if column["name"] in row]
    statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    return connection.execute(statement, [row[name] for name in columns]).lastrowid


def _reserve(connection: sqlite3.Connection, highest: int) -> None:
    """Numbers up to `highest` are not given again."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'queries'").fetchone()
    if row is None:
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('queries', ?)", (highest,))
    elif row["seq"] < highest:
        connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'queries'", (highest,))


def _switched(connection: sqlite3.Connection) -> dict[int, int]:
    """Number of withdrawals and restorings per answer; answers without any are left out."""
    return dict(
        connection.execute(
            "SELECT answer, COUNT(*) FROM events WHERE kind IN (?, ?) GROUP BY answer", _SWITCHES
        ).fetchall()
    )
