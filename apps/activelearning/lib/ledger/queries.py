# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""QueryLedger: record of queries, clients and answers, in SQLite (WAL mode) under the studies folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.ledger.answers import Answers
from lib.ledger.leases import Leases
from lib.ledger.overview import Overview
from lib.ledger.records import PROPOSED, SECOND, STATUSES, TAKEN_MARKS, Asked, Query, to_query, to_region
from lib.ledger.recovery import Recovered, Recovery
from lib.ledger.store import LedgerStore
from lib.regions import Region


class QueryLedger:
    """The record of queries, rounds and facts of one studies folder; `leases`, `answers` and `overview` are its parts.

    All parts share one `LedgerStore`, which owns the file and the transactions.

    Args:
        path: the SQLite file; made when missing.
        clock: seconds since 1970, replaceable in tests.
        idle_minutes: longest time between two requests that counts as work.

    Raises:
        LedgerError: the file belongs to a newer version or is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, idle_minutes: float = 5) -> None:
        self.store = LedgerStore(path, clock)
        self.leases = Leases(self.store, idle_minutes)
        self.answers = Answers(self.store, self.leases)
        self.overview = Overview(self.store)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self.store.path

    def stay_open(self) -> None:
        """See `LedgerStore.stay_open`."""
        self.store.stay_open()

    def recover(self, raw: Path) -> Recovered:
        """See `Recovery.recover`."""
        return Recovery(self.store).recover(raw)

    def ask(
        self, batch: str, method: str, round_: int, asked: Sequence[Asked], twice: Collection[int] = ()
    ) -> list[Query]:
        """Record a batch of regions as proposed; for a recorded `batch`, return its regions.

        A request that is repeated because its response was lost therefore gets the same regions. Regions at the
        positions `twice` also get a second reading, which `second_readings` offers to other clients.
        """
        now, highest = self.store.clock(), 0
        with self.store.transaction() as connection:
            known = connection.execute("SELECT * FROM queries WHERE batch = ? ORDER BY rank, id", (batch,)).fetchall()
            if not known:
                connection.executemany(
                    "INSERT INTO queries (image, x, y, z, dx, dy, dz, unit, score, method, round, rank, batch, reason,"
                    " status, asked) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (a.region.image, *a.region.start, *a.region.size, a.unit, a.score, method, round_, rank, batch,
                         json.dumps(a.reason), PROPOSED, now)
                        for rank, a in enumerate(asked)
                    ],
                )  # fmt: skip
                marks = ",".join("?" * len(twice))
                connection.execute(
                    "INSERT INTO queries (image, x, y, z, dx, dy, dz, unit, score, method, round, rank, batch, reason,"
                    " status, asked, twin) SELECT image, x, y, z, dx, dy, dz, unit, score, method, round, rank,"
                    " batch || ?, reason, ?, asked, id FROM queries"
                    f" WHERE batch = ? AND rank IN ({marks}) ORDER BY rank, id",
                    (SECOND, PROPOSED, batch, *twice),
                )
                known = connection.execute(
                    "SELECT * FROM queries WHERE batch = ? ORDER BY rank, id", (batch,)
                ).fetchall()
                # Second readings have numbers too, which the rows of the batch itself do not show.
                highest = int(connection.execute("SELECT COALESCE(MAX(id), 0) FROM queries").fetchone()[0])
        if highest:
            self.store.write_down([{"query": highest}])
        return [to_query(row) for row in known]

    def batch(self, batch: str) -> list[Query]:
        """Queries of one batch in rank order; empty when there is none."""
        return self.store.queries("batch = ? ORDER BY rank, id", (batch,))

    def join_batch(self, ids: Sequence[int], batch: str) -> None:
        """Add regions to a batch, so that a repeated request returns them too."""
        with self.store.transaction() as connection:
            connection.executemany("UPDATE queries SET batch = ? WHERE id = ?", [(batch, query) for query in ids])

    def proposed(self, method: str, round_: int, unit: str, limit: int | None = None) -> list[Query]:
        """Regions that were chosen but not yet leased, best first, without second readings."""
        condition = "status = ? AND twin IS NULL AND method = ? AND round = ? AND unit = ? ORDER BY asked, rank"
        return self.store.queries(
            f"{condition} LIMIT ?", (PROPOSED, method, round_, unit, -1 if limit is None else limit)
        )

    def withdraw_planned(self, before_round: int) -> int:
        """Withdraw regions planned in earlier rounds that were never leased; return their number.

        They were chosen by an older model, and would block the newer one from choosing their voxels. A second reading
        stays as long as its first one, since it blocks no further voxels.
        """
        with self.store.transaction() as connection:
            cursor = connection.execute(
                "UPDATE queries SET status = :withdrawn WHERE status = :proposed AND round < :round"
                " AND (twin IS NULL OR twin IN (SELECT id FROM queries WHERE status NOT IN (:open, :answered)))",
                {**STATUSES, "round": before_round},
            )
            return int(cursor.rowcount)

    def taken(self) -> dict[str, list[Region]]:
        """Regions that a method must not choose again, by image."""
        boxes: dict[str, list[Region]] = {}
        with self.store.connect() as connection:
            asked = connection.execute(
                f"SELECT image, x, y, z, dx, dy, dz FROM queries WHERE status IN ({TAKEN_MARKS})", STATUSES
            ).fetchall()
            free = connection.execute(
                "SELECT answers.image, answered.* FROM answered JOIN answers ON answers.id = answered.answer"
                " WHERE answers.active = 1 AND answered.query IS NULL"
            ).fetchall()
        for row in (*asked, *free):
            boxes.setdefault(row["image"], []).append(to_region(row))
        return boxes

    def query(self, query_id: int) -> Query | None:
        """One query, or None."""
        return next(iter(self.store.queries("id = ?", (query_id,))), None)

    def was_asked(self, image: str) -> bool:
        """Return whether a region of the image was ever leased."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT 1 FROM queries WHERE image = ? LIMIT 1", (image,)).fetchone()
        return row is not None

    def asked(self, image: str) -> list[Region]:
        """Every region of an image that was ever leased."""
        return list(dict.fromkeys(query.region for query in self.store.queries("image = ?", (image,))))

    def counts(self) -> dict[str, int]:
        """Number of queries in each status."""
        with self.store.connect() as connection:
            return dict(connection.execute("SELECT status, COUNT(*) FROM queries GROUP BY status").fetchall())

    # --- rounds and infos --------------------------------------------------------------------------------------------

    def record_round(
        self, round_: int, bundle: str, model: str, request: Mapping[str, Any], stats: Mapping[str, Any]
    ) -> None:
        """A finished training; recording it twice changes nothing."""
        with self.store.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO rounds (round, bundle, model, request, stats, finished) VALUES (?,?,?,?,?,?)",
                (
                    round_,
                    bundle,
                    model,
                    json.dumps(dict(request), default=str),
                    json.dumps(dict(stats)),
                    self.store.clock(),
                ),
            )

    def get_info(self, image: str, tag: str = "") -> dict[str, Any]:
        """Info that clients stored about an image (tag '') or one of its labels."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT content FROM info WHERE image = ? AND tag = ?", (image, tag)).fetchone()
        return json.loads(row[0]) if row else {}

    def update_info(self, image: str, info: Mapping[str, Any], tag: str = "") -> None:
        """Add keys to the info of an image or label, in one transaction, so that concurrent writers lose no keys."""
        with self.store.transaction() as connection:
            row = connection.execute("SELECT content FROM info WHERE image = ? AND tag = ?", (image, tag)).fetchone()
            content = {**(json.loads(row[0]) if row else {}), **info}
            connection.execute(
                "INSERT OR REPLACE INTO info VALUES (?, ?, ?)", (image, tag, json.dumps(content, default=str))
            )

    def infos(self, tag: str = "") -> dict[str, dict[str, Any]]:
        """Every info under a tag, by image."""
        with self.store.connect() as connection:
            rows = connection.execute("SELECT image, content FROM info WHERE tag = ?", (tag,)).fetchall()
        return {image: json.loads(content) for image, content in rows}

    def update_infos(self, infos: Mapping[str, Mapping[str, Any]], tag: str = "") -> None:
        """Replace the infos of many images at once."""
        with self.store.transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO info VALUES (?, ?, ?)",
                [(image, tag, json.dumps(content, default=str)) for image, content in infos.items()],
            )

    def get_meta(self, key: str) -> Any:
        """A fact about the studies folder as a whole; None when it was never noted."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (f"fact:{key}",)).fetchone()
        return json.loads(row[0]) if row else None

    def set_meta(self, key: str, value: Any) -> None:
        """Record a fact about the studies folder as a whole."""
        with self.store.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"fact:{key}", json.dumps(value)))
