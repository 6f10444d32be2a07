# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What the ledger holds: its tables and the records its callers see."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from lib.regions import Region, Triple

SCHEMA_VERSION = 1

Status = Literal["proposed", "open", "answered", "expired", "skipped", "withdrawn"]

# Statuses whose region must not be asked again: it is planned, somebody works on it, or it is annotated.
TAKEN: tuple[Status, ...] = ("proposed", "open", "answered", "skipped")

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS queries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    image TEXT NOT NULL,
    x INTEGER NOT NULL, y INTEGER NOT NULL, z INTEGER NOT NULL,
    dx INTEGER NOT NULL, dy INTEGER NOT NULL, dz INTEGER NOT NULL,
    unit TEXT NOT NULL,
    score REAL,
    method TEXT NOT NULL,
    round INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    batch TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '{}',
    status TEXT NOT NULL,
    client TEXT,
    asked REAL NOT NULL,
    leased REAL,
    lease_until REAL
);
CREATE INDEX IF NOT EXISTS queries_by_image ON queries (image, status);
CREATE INDEX IF NOT EXISTS queries_by_status ON queries (status, lease_until);
CREATE INDEX IF NOT EXISTS queries_by_batch ON queries (batch, rank);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    image TEXT NOT NULL,
    raw TEXT NOT NULL,
    raw_sha256 TEXT NOT NULL,
    info TEXT NOT NULL,
    client TEXT,
    submitted REAL NOT NULL,
    active INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX IF NOT EXISTS answers_by_image ON answers (image, active);
CREATE TABLE IF NOT EXISTS answered (
    answer INTEGER NOT NULL REFERENCES answers (id),
    query INTEGER,
    x INTEGER NOT NULL, y INTEGER NOT NULL, z INTEGER NOT NULL,
    dx INTEGER NOT NULL, dy INTEGER NOT NULL, dz INTEGER NOT NULL,
    minutes REAL
);
CREATE INDEX IF NOT EXISTS answered_by_answer ON answered (answer);
CREATE TABLE IF NOT EXISTS merged (image TEXT PRIMARY KEY, answer INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    round INTEGER NOT NULL,
    bundle TEXT NOT NULL,
    model TEXT NOT NULL UNIQUE,
    request TEXT NOT NULL,
    stats TEXT NOT NULL,
    finished REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS info (
    image TEXT NOT NULL,
    tag TEXT NOT NULL DEFAULT '',
    content TEXT NOT NULL,
    PRIMARY KEY (image, tag)
);
"""


@dataclass(frozen=True)
class Asked:
    """A region that a method chose, before it has a number: what `QueryLedger.ask` records."""

    region: Region
    unit: str
    score: float | None
    reason: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """A region that was asked for, as recorded."""

    id: int
    region: Region
    unit: str
    score: float | None
    method: str
    round: int
    rank: int
    batch: str
    reason: dict[str, Any]
    status: Status
    client: str | None
    leased: float | None
    lease_until: float | None

    def to_json(self) -> dict[str, Any]:
        """The entry of `regions` in an /activelearning answer."""
        return {
            "query": self.id,
            "image": self.region.image,
            "start": list(self.region.start),
            "size": list(self.region.size),
            "unit": self.unit,
            "score": self.score,
            "method": self.method,
            "round": self.round,
            "rank": self.rank,
            "reason": self.reason,
            "lease_until": iso(self.lease_until),
        }


@dataclass(frozen=True)
class Answer:
    """A submission: the raw file it came in and the regions it answers, `(query or None, region)` each."""

    id: int
    image: str
    raw: str
    raw_sha256: str
    info: dict[str, Any]
    client: str | None
    regions: list[tuple[int | None, Region]]


def iso(seconds: float | None) -> str | None:
    """A time as ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def to_region(row: Any) -> Region:
    start: Triple = (row["x"], row["y"], row["z"])
    return Region(row["image"], start, (row["dx"], row["dy"], row["dz"]))


def to_query(row: sqlite3.Row) -> Query:
    return Query(
        id=row["id"],
        region=to_region(row),
        unit=row["unit"],
        score=row["score"],
        method=row["method"],
        round=row["round"],
        rank=row["rank"],
        batch=row["batch"],
        reason=json.loads(row["reason"]),
        status=row["status"],
        client=row["client"],
        leased=row["leased"],
        lease_until=row["lease_until"],
    )
