# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Sums over the whole ledger, for the progress page and automatic rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lib.ledger.records import FREED_MARKS, SECOND, STATUSES, WITHDRAWN, Query
from lib.ledger.schema import UNCOUNTED
from lib.ledger.store import LedgerStore

_MINUTES = f"""
SELECT round, client, SUM(minutes) FROM (
    SELECT queries.round, answers.client, answered.minutes FROM answered
    JOIN answers ON answers.id = answered.answer JOIN queries ON queries.id = answered.query
    UNION ALL
    SELECT round, client, {UNCOUNTED} FROM queries WHERE worked > 0
) GROUP BY round, client
"""


class Standing(NamedTuple):
    """Number and voxels of the regions of one round, status and client."""

    round: int
    status: str
    client: str | None
    regions: int
    voxels: int


class Worked(NamedTuple):
    """Minutes that a client worked on regions of a round."""

    round: int
    client: str | None
    minutes: float


class AfterRound(NamedTuple):
    """Regions of later rounds that are planned or open, and that are answered."""

    pending: int
    answered: int


class AnsweredQuery(NamedTuple):
    """The newest active answer to a query.

    `first`: the first reading, which has the prediction; `assisted`: the drawing began with that prediction.
    """

    query: int
    first: int
    answer: int
    round: int
    method: str
    assisted: bool = False


class Overview:
    """Sums over all queries and answers; each is one read, for any number of images."""

    def __init__(self, store: LedgerStore) -> None:
        self.store = store

    def standing(self) -> list[Standing]:
        """Regions by round, status and client; a lease that ran out counts as expired."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT round, CASE WHEN status = :open AND lease_until < :now THEN :expired ELSE status END, client,"
                " COUNT(*), SUM(dx * dy * dz) FROM queries GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
                {**STATUSES, "now": self.store.clock()},
            ).fetchall()
        return [Standing(*row) for row in rows]

    def minutes(self) -> list[Worked]:
        """Minutes by round and client, answered or not."""
        with self.store.connect() as connection:
            return [Worked(row[0], row[1], float(row[2] or 0)) for row in connection.execute(_MINUTES)]

    def answered_queries(self) -> list[AnsweredQuery]:
        """Every query with an active answer, in order."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT queries.id, COALESCE(twin, queries.id), MAX(answers.id), round, method,"
                # SQLite takes the other columns of the row that holds the maximum.
                " json_extract(answers.info, '$.start') IS 'prediction' FROM answered"
                " JOIN answers ON answers.id = answered.answer JOIN queries ON queries.id = answered.query"
                " WHERE answers.active = 1 GROUP BY queries.id ORDER BY queries.id"
            ).fetchall()
        return [AnsweredQuery(*row) for row in rows]

    def answers_key(self) -> str:
        """Key that changes if an answer is added, withdrawn or restored."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT COUNT(*), SUM(active), SUM(active * id) FROM answers").fetchone()
        return ":".join(str(value or 0) for value in row)

    def after_round(self, round_: int, batch: str | None = None) -> AfterRound:
        """Numbers of the regions of later rounds that are planned or open (of one batch, if named), and answered.

        Second readings that are not leased yet do not count, since a second annotator may never take them.
        """
        with self.store.connect() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM((status = :open OR (status = :proposed AND twin IS NULL))"
                " AND (:batch IS NULL OR batch IN (:batch, :batch || :second))), 0),"
                " COALESCE(SUM(status = :answered), 0) FROM queries WHERE round > :round",
                {**STATUSES, "batch": batch, "second": SECOND, "round": round_},
            ).fetchone()
        return AfterRound(int(row[0]), int(row[1]))

    def first_batch(self, round_: int, regions: int) -> str | None:
        """The first batch of later rounds with at least so many regions, second readings aside."""
        with self.store.connect() as connection:
            row = connection.execute(
                "SELECT batch FROM queries WHERE round > ? AND twin IS NULL GROUP BY batch HAVING COUNT(*) >= ?"
                " ORDER BY MIN(id) LIMIT 1",
                (round_, regions),
            ).fetchone()
        return str(row[0]) if row else None

    def planned_method(self, round_: int) -> str | None:
        """Method of the next region of a round: a planned one, else a freed one."""
        with self.store.connect() as connection:
            row = connection.execute(
                "SELECT method FROM queries WHERE round = :round AND twin IS NULL AND status IN"
                f" (:proposed, {FREED_MARKS}) ORDER BY status = :proposed DESC, asked, rank LIMIT 1",
                {**STATUSES, "round": round_},
            ).fetchone()
        return str(row[0]) if row else None

    def latest(self, limit: int) -> list[Query]:
        """Up to `limit` regions for display: the leased ones, the next planned ones, the newest answered ones."""
        found: list[Query] = []
        for condition, share in (
            ("status = :open ORDER BY leased DESC, id DESC", limit),
            ("status = :proposed AND twin IS NULL ORDER BY round DESC, asked, rank, id", max(1, limit // 2)),
            ("status = :answered ORDER BY id DESC", limit),
        ):
            found += self.store.queries(
                f"{condition} LIMIT :limit", {**STATUSES, "limit": min(share, limit - len(found))}
            )
        return found

    def sizes(self) -> Mapping[int, int]:
        """Number of regions per round that were queried and not withdrawn, without second readings."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT round, COUNT(*) FROM queries WHERE twin IS NULL AND status != ? GROUP BY round", (WITHDRAWN,)
            ).fetchall()
        return {row[0]: row[1] for row in rows}
