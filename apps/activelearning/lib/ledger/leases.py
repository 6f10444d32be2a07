# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Leases of regions to clients, with their expiry and minutes of work."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import islice

from lib.ledger.records import (
    ANSWERED,
    EXPIRED,
    FREED,
    FREED_MARKS,
    OPEN,
    PROPOSED,
    RELEASED,
    SKIPPED,
    STATUSES,
    TAKEN_MARKS,
    Query,
    Status,
    to_query,
)
from lib.ledger.store import LeaseError, LedgerStore

# Pairs of readings of one region: `other` is the first reading of `mine`, or its second.
_PARTNER = "(other.twin = mine.id OR other.id = mine.twin)"
_OVERLAP = " AND ".join(
    f"other.{a} < mine.{a} + mine.d{a} AND mine.{a} < other.{a} + other.d{a}" for a in ("x", "y", "z")
)


class Leases:
    """Leases of regions: granted, renewed, released and skipped; at most one client holds a region.

    Args:
        store: the ledger's file.
        idle_minutes: longest time between two requests that counts as work.
    """

    def __init__(self, store: LedgerStore, idle_minutes: float) -> None:
        self.store = store
        self.idle_minutes = idle_minutes

    def lease(self, ids: Sequence[int], client: str, minutes: float) -> list[Query]:
        """Lease planned or freed queries to `client`, and renew its open queries on the same images.

        Unchanged are answered queries, those of another client, and freed ones whose voxels belong to a newer query.
        The result is in the order of `ids`.
        """
        now = self.store.clock()
        marks = ",".join("?" * len(ids))
        with self.store.transaction() as connection:
            rows = connection.execute(f"SELECT * FROM queries WHERE id IN ({marks})", tuple(ids)).fetchall()
            held = self.held(connection, client, {row["image"] for row in rows})
            self.count_work(connection, client, held)
            self.extend(connection, held, now)
            for row in rows:
                mine = row["status"] == OPEN and row["client"] == client
                if mine or (row["status"] in (PROPOSED, *FREED) and not _barred(connection, row, client)):
                    connection.execute(
                        "UPDATE queries SET lease_minutes = ?, lease_until = ? WHERE id = ?",
                        (minutes, now + 60 * minutes, row["id"]),
                    )
                    if not mine:
                        self._give(connection, row, client, now)
            rows = connection.execute(f"SELECT * FROM queries WHERE id IN ({marks})", tuple(ids)).fetchall()
        found = {row["id"]: to_query(row) for row in rows}
        return [found[i] for i in ids if i in found]

    def _give(self, connection: sqlite3.Connection, row: sqlite3.Row, client: str, now: float) -> None:
        connection.execute("UPDATE queries SET status = ?, note = NULL WHERE id = ?", (OPEN, row["id"]))
        if row["client"] != client:
            connection.execute(
                "UPDATE queries SET client = ?, leased = ?, opened = NULL, worked = 0 WHERE id = ?",
                (client, now, row["id"]),
            )
        self.store.note(connection, "leased", client, query=row["id"])

    def touch(self, client: str, image: str, opening: bool = False) -> list[Query]:
        """Record that `client` worked on its open regions of an image.

        Their leases start again, and the time since the last request counts as work. With `opening` the regions count
        as opened. If the client holds no region there, the cost is one read.
        """
        held = self.open_queries(image, client)
        if not held:
            return []
        now = self.store.clock()
        with self.store.transaction() as connection:
            ids = self.held(connection, client, {image})
            self.count_work(connection, client, ids)
            self.extend(connection, ids, now)
            if opening:
                connection.executemany(
                    "UPDATE queries SET opened = COALESCE(opened, ?) WHERE id = ?", [(now, query) for query in ids]
                )
        return self.open_queries(image, client)

    def renew(self, query_id: int, client: str) -> Query:
        """New lease for a region that the client holds, or held last if it is still free.

        Raises:
            LeaseError: the query is unknown, answered, held by another client or no longer free.
        """
        with self.store.transaction() as connection:
            row = self._owned(connection, query_id, client, (OPEN, *FREED))
            self.count_work(connection, client, [query_id])
            if row["status"] != OPEN:
                if _barred(connection, row, client):
                    raise LeaseError(
                        f"the lease of query {query_id} ran out and its voxels were asked for again; "
                        "ask for the next region"
                    )
                self._give(connection, row, client, self.store.clock())
            self.extend(connection, [query_id], self.store.clock())
            self.store.note(connection, "renewed", client, query=query_id)
            return to_query(connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone())

    def release(self, query_id: int, client: str, reason: str | None = None) -> Query:
        """Return a region to the pool at once.

        Raises:
            LeaseError: unknown, or not open for this client.
        """
        return self._end(query_id, client, RELEASED, reason)

    def skip(self, query_id: int, client: str, reason: str | None = None) -> Query:
        """Exclude a region from all later queries; a second reading that waits for it is dropped.

        Raises:
            LeaseError: unknown, or not open for this client.
        """
        return self._end(query_id, client, SKIPPED, reason)

    def _end(self, query_id: int, client: str, status: Status, reason: str | None) -> Query:
        with self.store.transaction() as connection:
            self._owned(connection, query_id, client, (OPEN,))
            self.count_work(connection, client, [query_id])
            connection.execute("UPDATE queries SET status = ?, note = ? WHERE id = ?", (status, reason, query_id))
            if status == SKIPPED:
                connection.execute(
                    "UPDATE queries AS other SET status = :withdrawn FROM queries AS mine"
                    f" WHERE mine.id = :id AND {_PARTNER} AND other.status IN (:proposed, {FREED_MARKS})",
                    {**STATUSES, "id": query_id},
                )
            self.store.note(connection, status, client, query=query_id, note=reason)
            return to_query(connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone())

    def expire(self) -> int:
        """Return regions with an expired lease to the pool; return their number."""
        over, values = "status = ? AND lease_until < ?", (OPEN, self.store.clock())
        # Most requests find no expired lease, and a write waits for the disk.
        if not self.store.queries(f"{over} LIMIT 1", values):
            return 0
        with self.store.transaction() as connection:
            return int(connection.execute(f"UPDATE queries SET status = ? WHERE {over}", (EXPIRED, *values)).rowcount)

    def open_queries(self, image: str | None = None, client: str | None = None) -> list[Query]:
        """Leased regions, of one image or one client if given."""
        clauses, values = ["status = ?"], list[str]([OPEN])
        for column, value in (("image", image), ("client", client)):
            if value is not None:
                clauses.append(f"{column} = ?")
                values.append(value)
        return self.store.queries(" AND ".join(clauses) + " ORDER BY id", tuple(values))

    def freed(self, method: str, round_: int, unit: str, client: str, limit: int = 1) -> list[Query]:
        """Freed regions that `client` may lease, best first, except those that it released itself."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT * FROM queries WHERE method = :method AND round = :round AND unit = :unit"
                f" AND status IN ({FREED_MARKS}) AND (status = :expired OR client IS NOT :client)"
                " ORDER BY asked, rank, id",
                {**STATUSES, "method": method, "round": round_, "unit": unit, "client": client},
            ).fetchall()
            free = (to_query(row) for row in rows if not _barred(connection, row, client))
            return list(islice(free, limit))

    def second_readings(self, client: str, limit: int) -> list[Query]:
        """Regions that another client read first and that wait for a second reading, oldest first."""
        condition = (
            "id IN (SELECT mine.id FROM queries AS mine JOIN queries AS other ON other.id = mine.twin"
            f" WHERE mine.status IN (:proposed, {FREED_MARKS}) AND other.status IN (:open, :answered)"
            " AND other.client IS NOT :client AND NOT (mine.status = :released AND mine.client IS :client))"
            " ORDER BY id LIMIT :limit"
        )
        return self.store.queries(condition, {**STATUSES, "client": client, "limit": limit})

    def last_holder(self, image: str) -> str | None:
        """Last client with a lease on the image; None if there was no lease."""
        held = self.store.queries("image = ? AND client IS NOT NULL ORDER BY leased DESC, id DESC LIMIT 1", (image,))
        return held[0].client if held else None

    def held_by(self, client: str) -> list[Query]:
        """Open regions of a client on any image, the oldest lease first."""
        return self.store.queries("client = ? AND status = ? ORDER BY leased, id", (client, OPEN))

    def last_worked(self, image: str, client: str) -> list[Query]:
        """Regions of the image that this client worked on last, although they are no longer open for it.

        Either a region with an expired lease and without an answer of another client, or all regions of the client's
        last submission, which it submits a second time.
        """
        mine = self.store.queries("image = ? AND client = ? ORDER BY leased DESC, id DESC LIMIT 1", (image, client))
        if not mine or mine[0].status not in (*FREED, ANSWERED):
            return []
        if mine[0].status == ANSWERED:
            last = (
                "id IN (SELECT query FROM answered WHERE answer = (SELECT MAX(answer) FROM answered WHERE query = ?))"
            )
            mine = self.store.queries(
                f"{last} AND client = ? AND status = ? ORDER BY id", (mine[0].id, client, ANSWERED)
            )
        else:
            others = self.store.queries("image = ? AND status = ? AND client IS NOT ?", (image, ANSWERED, client))
            if any(other.region.overlaps(mine[0].region) for other in others):
                return []
        return mine

    def _owned(
        self, connection: sqlite3.Connection, query_id: int, client: str, statuses: Sequence[str]
    ) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone()
        if row is None:
            raise LeaseError(f"there is no query {query_id}", 404)
        if row["status"] == ANSWERED:
            raise LeaseError(f"query {query_id} has been answered already; withdraw the answer to open it again")
        if row["status"] not in statuses:
            raise LeaseError(f"query {query_id} is not open but {row['status']}; ask for the next region")
        if row["client"] != client:
            raise LeaseError(f"query {query_id} is held by {row['client']}, not by {client}; ask for the next region")
        return row

    def held(self, connection: sqlite3.Connection, client: str, images: set[str]) -> list[int]:
        """Numbers of the queries on these images that are open for the client."""
        rows = connection.execute("SELECT id, image FROM queries WHERE client = ? AND status = ?", (client, OPEN))
        return [row["id"] for row in rows if row["image"] in images]

    def extend(self, connection: sqlite3.Connection, ids: Sequence[int], now: float) -> None:
        """Restart the leases of open queries at `now`."""
        connection.executemany(
            "UPDATE queries SET lease_until = MAX(lease_until, ? + 60 * COALESCE(lease_minutes, 0)) WHERE id = ?",
            [(now, query) for query in ids],
        )

    def count_work(self, connection: sqlite3.Connection, client: str, ids: Sequence[int]) -> None:
        """Add the time since the client's last request, at most `idle_minutes`, to `ids` in equal parts.

        Time is counted once, so that the sum over all regions of a client is its time of work.
        """
        now = self.store.clock()
        row = connection.execute("SELECT seen FROM clients WHERE client = ?", (client,)).fetchone()
        gap = min(max(now - row["seen"], 0.0), 60 * self.idle_minutes) if row else 0.0
        if gap and ids:
            connection.executemany(
                "UPDATE queries SET worked = worked + ? WHERE id = ?", [(gap / len(ids), query) for query in ids]
            )
        connection.execute("INSERT OR REPLACE INTO clients VALUES (?, ?)", (client, now))


def _barred(connection: sqlite3.Connection, row: sqlite3.Row, client: str) -> bool:
    """Return whether `client` must not lease a region: it has the other reading, or a newer query covers the voxels."""
    values = {**STATUSES, "id": row["id"], "client": client}
    condition = f"mine.id = :id AND {_PARTNER} AND other.client = :client AND other.status IN (:open, :answered)"
    found = connection.execute(f"SELECT 1 FROM queries AS mine, queries AS other WHERE {condition}", values).fetchone()
    if found is None and row["status"] in FREED:
        found = connection.execute(
            "SELECT 1 FROM queries AS mine JOIN queries AS other ON other.image = mine.image AND other.id != mine.id"
            f" WHERE mine.id = :id AND other.status IN ({TAKEN_MARKS}) AND COALESCE({_PARTNER}, 0) = 0 AND {_OVERLAP}",
            values,
        ).fetchone()
    return found is not None
