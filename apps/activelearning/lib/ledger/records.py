# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The records of the ledger that its callers see."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple, get_args

from lib.regions import Region, Triple

# Suffix of the batch of second readings after the name of the first one.
SECOND = ":second"

# Recorded client if a request has no identity.
ANONYMOUS = "anonymous"
# First character of ids that the server derives from a connection. Clients cannot send it, so they cannot pose as one.
DERIVED = "~"

Status = Literal["proposed", "open", "answered", "expired", "released", "skipped", "withdrawn"]

PROPOSED: Status = "proposed"
OPEN: Status = "open"
ANSWERED: Status = "answered"
EXPIRED: Status = "expired"
RELEASED: Status = "released"
SKIPPED: Status = "skipped"
WITHDRAWN: Status = "withdrawn"
# Named parameters of statements: `status = :open`.
STATUSES: dict[str, Any] = {status: status for status in get_args(Status)}

# Statuses whose region must not be chosen again: it is planned, leased, annotated or skipped.
TAKEN: tuple[Status, ...] = (PROPOSED, OPEN, ANSWERED, SKIPPED)
TAKEN_MARKS = ", ".join(f":{status}" for status in TAKEN)
# Statuses of freed regions: the lease expired, or the holder released them.
FREED: tuple[Status, ...] = (EXPIRED, RELEASED)
FREED_MARKS = ", ".join(f":{status}" for status in FREED)


@dataclass(frozen=True)
class Asked:
    """A region that a method chose, without a number yet; `QueryLedger.ask` records it."""

    region: Region
    unit: str
    score: float | None
    reason: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """A queried region, as recorded.

    `leased`, `opened` and `lease_until` are seconds since 1970, `worked` the seconds of work of its holder. `twin` is
    the query of the first reading if this is a second one; `note` is the reason for a skip or release.
    """

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
    opened: float | None
    worked: float
    twin: int | None
    note: str | None

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


class AnsweredRegion(NamedTuple):
    """A region of a submission and the query it answers; None if no query of the client covers it."""

    query: int | None
    region: Region


@dataclass(frozen=True)
class Answer:
    """A submission: the raw file it came in and the regions it answers."""

    id: int
    image: str
    raw: str
    raw_sha256: str
    info: dict[str, Any]
    client: str | None
    regions: list[AnsweredRegion]
    submitted: float = 0.0
    active: bool = True


@dataclass(frozen=True)
class Agreement:
    """Dice of one class between two people's answers to one region; None where neither drew the class."""

    region: Region
    other: int
    name: str
    dice: float | None
    voxels: int
    other_voxels: int


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
        opened=row["opened"],
        worked=row["worked"],
        twin=row["twin"],
        note=row["note"],
    )
