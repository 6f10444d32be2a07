# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""QueryLedger: what was asked, of whom, and what came back. SQLite in WAL mode under the studies folder."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.ledger_records import SCHEMA, SCHEMA_VERSION, TAKEN, Answer, Asked, Query, to_query, to_region
from lib.regions import Region

BUSY_SECONDS = 30.0


class LedgerError(RuntimeError):
    """The ledger cannot be used as asked; the message says why."""


class QueryLedger:
    """The record of queries, leases, answers and rounds of one studies folder.

    Any number of processes may hold one open: every method is one transaction, writers wait for each other, and a
    commit is on disk (`synchronous=FULL`) before the method returns.

    Args:
        path: the SQLite file; made when missing.
        clock: seconds since 1970, replaceable in tests.

    Raises:
        LedgerError: the file belongs to a newer version.
    """

    def __init__(self, path: Path, clock: Any = time.time) -> None:
        self.path = path
        self.clock = clock
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as connection:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
            found = int(connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])
        if found > SCHEMA_VERSION:
            raise LedgerError(f"{path} was written by a newer version (schema {found}); update this program")

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        # A connection a call: threads and forked children never share one, and opening costs a tenth of a millisecond.
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA journal_mode=WAL")
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
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, batch: str, method: str, round_: int, asked: Sequence[Asked]) -> list[Query]:
        """Records a batch of regions as proposed; the same `batch` again returns what was recorded first.

        A request that was repeated because its answer got lost therefore gets the same regions.
        """
        now = self.clock()
        with self._transaction() as connection:
            known = connection.execute("SELECT * FROM queries WHERE batch = ? ORDER BY rank", (batch,)).fetchall()
            if not known:
                connection.executemany(
                    "INSERT INTO queries (image, x, y, z, dx, dy, dz, unit, score, method, round, rank, batch, reason,"
                    " status, asked) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'proposed', ?)",
                    [
                        (a.region.image, *a.region.start, *a.region.size, a.unit, a.score, method, round_, rank, batch,
                         json.dumps(a.reason), now)
                        for rank, a in enumerate(asked)
                    ],
                )  # fmt: skip
                known = connection.execute("SELECT * FROM queries WHERE batch = ? ORDER BY rank", (batch,)).fetchall()
        return [to_query(row) for row in known]

    def batch(self, batch: str) -> list[Query]:
        """Queries of one batch in rank order; empty when there is none."""
        return self._queries("batch = ? ORDER BY rank", (batch,))

    def lease(self, ids: Sequence[int], client: str, minutes: float) -> list[Query]:
        """Gives proposed or expired queries to `client`; those already open for this client get a new lease.

        Queries that somebody else holds or that are answered keep what they are. Returned in the order of `ids`.
        """
        now = self.clock()
        marks = ",".join("?" * len(ids))
        with self._transaction() as connection:
            connection.execute(
                "UPDATE queries SET status = 'open', client = ?, leased = COALESCE(leased, ?), lease_until = ?"
                f" WHERE id IN ({marks}) AND (status IN ('proposed', 'expired') OR (status = 'open' AND client = ?))",
                (client, now, now + 60 * minutes, *ids, client),
            )
            rows = connection.execute(f"SELECT * FROM queries WHERE id IN ({marks})", tuple(ids)).fetchall()
        found = {row["id"]: to_query(row) for row in rows}
        return [found[i] for i in ids if i in found]

    def proposed(self, method: str, round_: int, unit: str) -> list[Query]:
        """Regions that were chosen but not yet handed out, best first."""
        condition = "status = 'proposed' AND method = ? AND round = ? AND unit = ? ORDER BY asked, rank"
        return self._queries(condition, (method, round_, unit))

    def expire(self) -> int:
        """Returns regions whose lease ran out to the pool; how many."""
        with self._transaction() as connection:
            cursor = connection.execute(
                "UPDATE queries SET status = 'expired' WHERE status = 'open' AND lease_until < ?", (self.clock(),)
            )
            return int(cursor.rowcount)

    def withdraw_planned(self, before_round: int) -> int:
        """Gives up regions planned in earlier rounds that nobody was handed; how many.

        They were chosen by an older model; kept, they would bar the newer one from asking there.
        """
        with self._transaction() as connection:
            cursor = connection.execute(
                "UPDATE queries SET status = 'withdrawn' WHERE status = 'proposed' AND round < ?", (before_round,)
            )
            return int(cursor.rowcount)

    def taken(self) -> dict[str, list[Region]]:
        """Regions a method must not ask for again, by image."""
        boxes: dict[str, list[Region]] = {}
        marks = ",".join("?" * len(TAKEN))
        with self._connect() as connection:
            asked = connection.execute(f"SELECT * FROM queries WHERE status IN ({marks})", TAKEN).fetchall()
            free = connection.execute(
                "SELECT answers.image, answered.* FROM answered JOIN answers ON answers.id = answered.answer"
                " WHERE answers.active = 1 AND answered.query IS NULL"
            ).fetchall()
        for row in (*asked, *free):
            boxes.setdefault(row["image"], []).append(to_region(row))
        return boxes

    def answered_regions(self) -> dict[str, list[Region]]:
        """Regions that are annotated, by image."""
        boxes: dict[str, list[Region]] = {}
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT answers.image, answered.* FROM answered JOIN answers ON answers.id = answered.answer"
                " WHERE answers.active = 1 ORDER BY answers.id"
            ).fetchall()
        for row in rows:
            boxes.setdefault(row["image"], []).append(to_region(row))
        return {image: list(dict.fromkeys(regions)) for image, regions in boxes.items()}

    def open_queries(self, image: str | None = None, client: str | None = None) -> list[Query]:
        """Leased regions, of one image and one client where given."""
        clauses, values = ["status = 'open'"], []
        for column, value in (("image", image), ("client", client)):
            if value is not None:
                clauses.append(f"{column} = ?")
                values.append(value)
        return self._queries(" AND ".join(clauses) + " ORDER BY id", tuple(values))

    def query(self, query_id: int) -> Query | None:
        """One query, or None."""
        return next(iter(self._queries("id = ?", (query_id,))), None)

    def last_worked(self, image: str, client: str) -> list[Query]:
        """The region this client worked on last on the image, though it is no longer open for them.

        Either its lease ran out and nobody else has answered it, or they answered it and submit a second time.
        """
        mine = self._queries("image = ? AND client = ? ORDER BY leased DESC, id DESC LIMIT 1", (image, client))
        if not mine or mine[0].status not in ("expired", "answered"):
            return []
        if mine[0].status == "expired":
            others = self._queries("image = ? AND status = 'answered' AND client IS NOT ?", (image, client))
            if any(other.region.overlaps(mine[0].region) for other in others):
                return []
        return mine

    def was_asked(self, image: str) -> bool:
        """Whether anybody was ever asked about the image."""
        with self._connect() as connection:
            row = connection.execute("SELECT 1 FROM queries WHERE image = ? LIMIT 1", (image,)).fetchone()
        return row is not None

    def counts(self) -> dict[str, int]:
        """Number of queries in each status."""
        with self._connect() as connection:
            return dict(connection.execute("SELECT status, COUNT(*) FROM queries GROUP BY status").fetchall())

    # --- answering ---------------------------------------------------------------------------------------------------

    def record_answer(
        self,
        image: str,
        raw: str,
        raw_sha256: str,
        info: Mapping[str, Any],
        client: str | None,
        regions: Iterable[tuple[int | None, Region]],
    ) -> int:
        """Records a submission whose raw file is on disk and closes its queries; the number of the answer.

        The merged label is brought up to date afterwards (`mark_merged`); until then the image is listed by
        `unmerged`, so that a kill in between is repaired from the raw file.
        """
        now = self.clock()
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO answers (image, raw, raw_sha256, info, client, submitted) VALUES (?, ?, ?, ?, ?, ?)",
                (image, raw, raw_sha256, json.dumps(dict(info)), client, now),
            )
            answer = int(cursor.lastrowid or 0)
            for query, region in regions:
                row = connection.execute("SELECT leased, status FROM queries WHERE id = ?", (query,)).fetchone()
                minutes = (now - row["leased"]) / 60 if row and row["leased"] and row["status"] != "answered" else None
                connection.execute(
                    "INSERT INTO answered VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (answer, query, *region.start, *region.size, minutes),
                )
                connection.execute("UPDATE queries SET status = 'answered' WHERE id = ?", (query,))
        return answer

    def answers(self, image: str) -> list[Answer]:
        """Active submissions of an image, oldest first; rebuilding its label means applying them in this order."""
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT * FROM answers WHERE image = ? AND active = 1 ORDER BY id", (image,)
            ).fetchall()
            parts = {
                row["id"]: connection.execute("SELECT * FROM answered WHERE answer = ? ORDER BY rowid", (row["id"],))
                for row in rows
            }
            return [
                Answer(
                    id=row["id"],
                    image=image,
                    raw=row["raw"],
                    raw_sha256=row["raw_sha256"],
                    info=json.loads(row["info"]),
                    client=row["client"],
                    regions=[(part["query"], to_region({**dict(part), "image": image})) for part in parts[row["id"]]],
                )
                for row in rows
            ]

    def answered_images(self) -> list[str]:
        """Images with an active submission, sorted."""
        with self._connect() as connection:
            rows = connection.execute("SELECT DISTINCT image FROM answers WHERE active = 1 ORDER BY image").fetchall()
        return [row[0] for row in rows]

    def mark_merged(self, image: str, answer: int) -> None:
        """The label on disk holds every submission up to `answer`."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO merged VALUES (?, ?)", (image, answer))

    def unmerged(self) -> list[str]:
        """Images whose label on disk may lack a submission: a kill came between the record and the merge."""
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT image FROM answers LEFT JOIN merged USING (image) GROUP BY image"
                " HAVING MAX(answers.id) > COALESCE(merged.answer, 0) ORDER BY image"
            ).fetchall()
        return [row[0] for row in rows]

    # --- rounds and infos --------------------------------------------------------------------------------------------

    def record_round(
        self, round_: int, bundle: str, model: str, request: Mapping[str, Any], stats: Mapping[str, Any]
    ) -> None:
        """A finished training; recording it twice changes nothing."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO rounds (round, bundle, model, request, stats, finished) VALUES (?,?,?,?,?,?)",
                (round_, bundle, model, json.dumps(dict(request), default=str), json.dumps(dict(stats)), self.clock()),
            )

    def get_info(self, image: str, tag: str = "") -> dict[str, Any]:
        """What clients stored about an image (tag '') or one of its labels."""
        with self._connect() as connection:
            row = connection.execute("SELECT content FROM info WHERE image = ? AND tag = ?", (image, tag)).fetchone()
        return json.loads(row[0]) if row else {}

    def update_info(self, image: str, info: Mapping[str, Any], tag: str = "") -> None:
        """Adds keys to the info of an image or label; read and written in one transaction, so no writer loses keys."""
        with self._transaction() as connection:
            row = connection.execute("SELECT content FROM info WHERE image = ? AND tag = ?", (image, tag)).fetchone()
            content = {**(json.loads(row[0]) if row else {}), **info}
            connection.execute(
                "INSERT OR REPLACE INTO info VALUES (?, ?, ?)", (image, tag, json.dumps(content, default=str))
            )

    def _queries(self, condition: str, values: tuple[Any, ...]) -> list[Query]:
        with self._connect() as connection:
            return [to_query(row) for row in connection.execute(f"SELECT * FROM queries WHERE {condition}", values)]
