# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Who works on which region, until when, and for how long: the ledger's leases and minutes."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import islice

from lib.ledger.records import FREED, TAKEN, Query, to_query
from lib.ledger.store import LeaseError, LedgerStore

# Pairs of readings of one region: `other` is the first reading of `mine`, or its second.
_PARTNER = "(other.twin = mine.id OR other.id = mine.twin)"
_OVERLAP = " AND ".join(
    f"other.{a} < mine.{a} + mine.d{a} AND mine.{a} < other.{a} + other.d{a}" for a in ("x", "y", "z")
)


class Leases(LedgerStore):
    """Regions handed out, renewed, given back and skipped; no two clients ever hold one region."""

    def lease(self, ids: Sequence[int], client: str, minutes: float) -> list[Query]:
        """Gives planned or freed queries to `client`; those already open for this client on the images get a new lease.

        Queries that somebody else holds or that are answered keep what they are, and so do freed ones whose voxels have
        been asked for again. Returned in the order of `ids`.
        """
        now = self.clock()
        marks = ",".join("?" * len(ids))
        with self._transaction() as connection:
            rows = connection.execute(f"SELECT * FROM queries WHERE id IN ({marks})", tuple(ids)).fetchall()
            held = self._held(connection, client, {row["image"] for row in rows})
            self._work(connection, client, held)
            self._renew(connection, held, now)
            for row in rows:
                mine = row["status"] == "open" and row["client"] == client
                if mine or (row["status"] in ("proposed", *FREED) and not _barred(connection, row, client)):
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
        connection.execute("UPDATE queries SET status = 'open', note = NULL WHERE id = ?", (row["id"],))
        if row["client"] != client:
            connection.execute(
                "UPDATE queries SET client = ?, leased = ?, opened = NULL, worked = 0 WHERE id = ?",
                (client, now, row["id"]),
            )
        self._note(connection, "leased", client, query=row["id"])

    def touch(self, client: str, image: str, opening: bool = False) -> list[Query]:
        """Notes that `client` worked on its open regions of an image: leases run anew, the time since its last request
        counts as work, and with `opening` the regions count as opened.

        Costs one read where the client holds nothing there.
        """
        held = self.open_queries(image, client)
        if not held:
            return []
        now = self.clock()
        with self._transaction() as connection:
            ids = self._held(connection, client, {image})
            self._work(connection, client, ids)
            self._renew(connection, ids, now)
            if opening:
                connection.executemany(
                    "UPDATE queries SET opened = COALESCE(opened, ?) WHERE id = ?", [(now, query) for query in ids]
                )
        return self.open_queries(image, client)

    def renew(self, query_id: int, client: str) -> Query:
        """A new lease for a region that the client holds, or held last and that is still free.

        Raises:
            LeaseError: unknown, answered, held by somebody else or no longer free.
        """
        with self._transaction() as connection:
            row = self._owned(connection, query_id, client, ("open", *FREED))
            self._work(connection, client, [query_id])
            if row["status"] != "open":
                if _barred(connection, row, client):
                    raise LeaseError(
                        f"the lease of query {query_id} ran out and its voxels were asked for again; "
                        "ask for the next region"
                    )
                self._give(connection, row, client, self.clock())
            self._renew(connection, [query_id], self.clock())
            self._note(connection, "renewed", client, query=query_id)
            return to_query(connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone())

    def release(self, query_id: int, client: str, reason: str | None = None) -> Query:
        """Gives a region back to the pool at once.

        Raises:
            LeaseError: unknown, or not open for this client.
        """
        return self._end(query_id, client, "released", reason)

    def skip(self, query_id: int, client: str, reason: str | None = None) -> Query:
        """Marks a region as one that nobody is asked about again; a second reading that waits for it is dropped.

        Raises:
            LeaseError: unknown, or not open for this client.
        """
        return self._end(query_id, client, "skipped", reason)

    def _end(self, query_id: int, client: str, status: str, reason: str | None) -> Query:
        with self._transaction() as connection:
            self._owned(connection, query_id, client, ("open",))
            self._work(connection, client, [query_id])
            connection.execute("UPDATE queries SET status = ?, note = ? WHERE id = ?", (status, reason, query_id))
            if status == "skipped":
                connection.execute(
                    "UPDATE queries AS other SET status = 'withdrawn' FROM queries AS mine"
                    f" WHERE mine.id = ? AND {_PARTNER} AND other.status IN ('proposed', 'expired', 'released')",
                    (query_id,),
                )
            self._note(connection, status, client, query=query_id, note=reason)
            return to_query(connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone())

    def expire(self) -> int:
        """Returns regions whose lease ran out to the pool; how many."""
        over, now = "status = 'open' AND lease_until < ?", self.clock()
        # Most requests find nothing to return, and a write waits for the disk.
        if not self._queries(f"{over} LIMIT 1", (now,)):
            return 0
        with self._transaction() as connection:
            return int(connection.execute(f"UPDATE queries SET status = 'expired' WHERE {over}", (now,)).rowcount)

    def open_queries(self, image: str | None = None, client: str | None = None) -> list[Query]:
        """Leased regions, of one image and one client where given."""
        clauses, values = ["status = 'open'"], []
        for column, value in (("image", image), ("client", client)):
            if value is not None:
                clauses.append(f"{column} = ?")
                values.append(value)
        return self._queries(" AND ".join(clauses) + " ORDER BY id", tuple(values))

    def freed(self, method: str, round_: int, unit: str, client: str, limit: int = 1) -> list[Query]:
        """Regions that were given back and may be handed to `client`, best first; not those it released itself."""
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT * FROM queries WHERE method = ? AND round = ? AND unit = ?"
                " AND status IN ('expired', 'released') AND (status = 'expired' OR client IS NOT ?)"
                " ORDER BY asked, rank, id",
                (method, round_, unit, client),
            ).fetchall()
            free = (to_query(row) for row in rows if not _barred(connection, row, client))
            return list(islice(free, limit))

    def second_readings(self, client: str, limit: int) -> list[Query]:
        """Regions that somebody else was handed and that wait for a second reading, oldest first."""
        condition = (
            "id IN (SELECT mine.id FROM queries AS mine JOIN queries AS other ON other.id = mine.twin"
            " WHERE mine.status IN ('proposed', 'expired', 'released') AND other.status IN ('open', 'answered')"
            " AND other.client IS NOT ? AND NOT (mine.status = 'released' AND mine.client IS ?)) ORDER BY id LIMIT ?"
        )
        return self._queries(condition, (client, client, limit))

    def last_holder(self, image: str) -> str | None:
        """Who was handed a region of the image last; None where nobody ever was."""
        held = self._queries("image = ? AND client IS NOT NULL ORDER BY leased DESC, id DESC LIMIT 1", (image,))
        return held[0].client if held else None

    def last_worked(self, image: str, client: str) -> list[Query]:
        """What this client worked on last on the image, though it is no longer open for them.

        Either a region whose lease ran out and that nobody else has answered, or all regions of their last submission,
        which they submit a second time.
        """
        mine = self._queries("image = ? AND client = ? ORDER BY leased DESC, id DESC LIMIT 1", (image, client))
        if not mine or mine[0].status not in (*FREED, "answered"):
            return []
        if mine[0].status == "answered":
            last = (
                "id IN (SELECT query FROM answered WHERE answer = (SELECT MAX(answer) FROM answered WHERE query = ?))"
            )
            mine = self._queries(f"{last} AND client = ? AND status = 'answered' ORDER BY id", (mine[0].id, client))
        else:
            others = self._queries("image = ? AND status = 'answered' AND client IS NOT ?", (image, client))
            if any(other.region.overlaps(mine[0].region) for other in others):
                return []
        return mine

    def _owned(
        self, connection: sqlite3.Connection, query_id: int, client: str, statuses: Sequence[str]
    ) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute("SELECT * FROM queries WHERE id = ?", (query_id,)).fetchone()
        if row is None:
            raise LeaseError(f"there is no query {query_id}", 404)
        if row["status"] == "answered":
            raise LeaseError(f"query {query_id} has been answered already; withdraw the answer to open it again")
        if row["status"] not in statuses:
            raise LeaseError(f"query {query_id} is not open but {row['status']}; ask for the next region")
        if row["client"] != client:
            raise LeaseError(f"query {query_id} is held by {row['client']}, not by {client}; ask for the next region")
        return row

    def _held(self, connection: sqlite3.Connection, client: str, images: set[str]) -> list[int]:
        rows = connection.execute("SELECT id, image FROM queries WHERE client = ? AND status = 'open'", (client,))
        return [row["id"] for row in rows if row["image"] in images]

    def _renew(self, connection: sqlite3.Connection, ids: Sequence[int], now: float) -> None:
        connection.executemany(
            "UPDATE queries SET lease_until = MAX(lease_until, ? + 60 * COALESCE(lease_minutes, 0)) WHERE id = ?",
            [(now, query) for query in ids],
        )

    def _work(self, connection: sqlite3.Connection, client: str, ids: Sequence[int]) -> None:
        """Counts the time since the client's last request, at most `idle_minutes`, in equal parts for `ids`.

        Time is counted once, so that the regions of somebody who holds many add up to the time they worked.
        """
        now = self.clock()
        row = connection.execute("SELECT seen FROM clients WHERE client = ?", (client,)).fetchone()
        gap = min(max(now - row["seen"], 0.0), 60 * self.idle_minutes) if row else 0.0
        if gap and ids:
            connection.executemany(
                "UPDATE queries SET worked = worked + ? WHERE id = ?", [(gap / len(ids), query) for query in ids]
            )
        connection.execute("INSERT OR REPLACE INTO clients VALUES (?, ?)", (client, now))


def _barred(connection: sqlite3.Connection, row: sqlite3.Row, client: str) -> bool:
    """Whether a region may not go to `client`: its other reading is theirs, or it was freed and asked for again."""
    marks = ",".join("?" * len(TAKEN))
    condition = f"mine.id = ? AND {_PARTNER} AND other.client = ? AND other.status IN ('open', 'answered')"
    found = connection.execute(
        f"SELECT 1 FROM queries AS mine, queries AS other WHERE {condition}", (row["id"], client)
    ).fetchone()
    if found is None and row["status"] in FREED:
        found = connection.execute(
            "SELECT 1 FROM queries AS mine JOIN queries AS other ON other.image = mine.image AND other.id != mine.id"
            f" WHERE mine.id = ? AND other.status IN ({marks}) AND COALESCE({_PARTNER}, 0) = 0 AND {_OVERLAP}",
            (row["id"], *TAKEN),
        ).fetchone()
    return found is not None
