# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Submissions, their withdrawal, and inter-rater agreement."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lib.ledger.leases import Leases
from lib.ledger.records import ANSWERED, Agreement, Answer, AnsweredRegion, to_region
from lib.ledger.recovery import entry_of, switch
from lib.ledger.schema import UNCOUNTED
from lib.ledger.store import LeaseError, LedgerStore
from lib.regions import Region


class Merged(NamedTuple):
    """Newest submission that a label on disk holds, and the digest of its file; (0, None) where unknown."""

    answer: int
    sha256: str | None


class Answers:
    """Submissions of one studies folder; none is ever deleted."""

    def __init__(self, store: LedgerStore, leases: Leases) -> None:
        self.store = store
        self.leases = leases

    def record(
        self,
        image: str,
        raw: str,
        raw_sha256: str,
        info: Mapping[str, Any],
        client: str | None,
        regions: Iterable[tuple[int | None, Region]],
        agreements: Iterable[Agreement] = (),
    ) -> int:
        """Record a submission whose raw file is on disk and close its queries; return the number of the answer.

        The merged label is updated afterwards (`mark_merged`). Until then `unmerged` lists the image, so that start-up
        recovery rebuilds the label from the raw file.
        """
        now, parts = self.store.clock(), list(regions)
        queries = [query for query, _ in parts if query is not None]
        with self.store.transaction() as connection:
            if client is not None:
                self.leases.count_work(connection, client, queries)
                self.leases.extend(connection, self.leases.held(connection, client, {image}), now)
            cursor = connection.execute(
                "INSERT INTO answers (image, raw, raw_sha256, info, client, submitted) VALUES (?, ?, ?, ?, ?, ?)",
                (image, raw, raw_sha256, json.dumps(dict(info)), client, now),
            )
            answer = int(cursor.lastrowid or 0)
            for query, region in parts:
                connection.execute(
                    "INSERT INTO answered VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (answer, query, *region.start, *region.size, _new_minutes(connection, query)),
                )
                connection.execute("UPDATE queries SET status = ? WHERE id = ?", (ANSWERED, query))
                self.store.note(connection, "answered", client, query=query, answer=answer)
            connection.executemany(
                "INSERT INTO agreement VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (answer, a.other, *a.region.start, *a.region.size, a.name, a.dice, a.voxels, a.other_voxels)
                    for a in agreements
                ],
            )
            entry = entry_of(connection, answer)
        self.store.write_down([entry])
        return answer

    def withdraw(self, answer_id: int, client: str | None, reason: str | None = None) -> Answer:
        """Remove an answer from its image's label; return queries without another answer to the pool.

        The record and the raw file stay. The label is rebuilt afterwards; until then `unmerged` lists the image.

        Raises:
            LeaseError: no such answer, or it was withdrawn before.
        """
        return self._switch(answer_id, client, reason, active=False)

    def restore(self, answer_id: int, client: str | None, reason: str | None = None) -> Answer:
        """Revert a withdrawal; newer answers to the same voxels still take precedence.

        Raises:
            LeaseError: no such answer, or it was not withdrawn.
        """
        return self._switch(answer_id, client, reason, active=True)

    def _switch(self, answer_id: int, client: str | None, reason: str | None, active: bool) -> Answer:
        with self.store.transaction() as connection:
            row = connection.execute("SELECT raw, active FROM answers WHERE id = ?", (answer_id,)).fetchone()
            if row is None:
                raise LeaseError(f"there is no answer {answer_id}; GET /patchwise/answers lists them", 404)
            if bool(row["active"]) == active:
                raise LeaseError(f"answer {answer_id} " + ("is not withdrawn" if active else "is withdrawn already"))
            switch(connection, answer_id, active)
            self.store.note(connection, "restored" if active else "withdrawn", client, answer=answer_id, note=reason)
        self.store.write_down([{"switch": row["raw"], "active": active, "note": reason}])
        found = self.get(answer_id)
        assert found is not None, "an answer is never deleted"
        return found

    def agreements(self) -> list[dict[str, Any]]:
        """Every region that two people answered, with the Dice of each class; withdrawn answers do not count."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT agreement.*, mine.image, mine.client, other.client AS other_client FROM agreement"
                " JOIN answers AS mine ON mine.id = agreement.answer"
                " JOIN answers AS other ON other.id = agreement.other"
                " WHERE mine.active = 1 AND other.active = 1 ORDER BY agreement.rowid"
            ).fetchall()
        pairs: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            region = to_region(row)
            pair = pairs.setdefault(
                (row["answer"], row["other"], region),
                {
                    "image": region.image,
                    "start": list(region.start),
                    "size": list(region.size),
                    "answers": [row["other"], row["answer"]],
                    "clients": [row["other_client"], row["client"]],
                    "classes": {},
                },
            )
            voxels = [row["other_voxels"], row["voxels"]]
            pair["classes"][row["name"]] = {"dice": row["dice"], "voxels": voxels}
        return list(pairs.values())

    def of_image(self, image: str, withdrawn: bool = False) -> list[Answer]:
        """Submissions of an image, oldest first; rebuilding its label means applying the active ones in this order.

        Those that were withdrawn are only listed with `withdrawn`.
        """
        return self._answers("image = ?" + ("" if withdrawn else " AND active = 1"), (image,))

    def get(self, answer_id: int) -> Answer | None:
        """One submission, withdrawn or not, or None."""
        return next(iter(self._answers("id = ?", (answer_id,))), None)

    def earlier_reading(self, region: Region, client: str | None) -> Answer | None:
        """The newest active answer of another client to exactly this region, or None."""
        condition = (
            "active = 1 AND image = ? AND client IS NOT NULL AND client IS NOT ? AND id IN (SELECT answer FROM answered"
            " WHERE x = ? AND y = ? AND z = ? AND dx = ? AND dy = ? AND dz = ?)"
        )
        found = self._answers(condition, (region.image, client, *region.start, *region.size))
        return found[-1] if found else None

    def submitted(self, query_id: int) -> float | None:
        """Time of the newest active answer to a query; None if there is none."""
        with self.store.connect() as connection:
            row = connection.execute(
                "SELECT MAX(submitted) FROM answers JOIN answered ON answered.answer = answers.id"
                " WHERE answered.query = ? AND active = 1",
                (query_id,),
            ).fetchone()
        return None if row[0] is None else float(row[0])

    def _answers(self, condition: str, values: tuple[Any, ...]) -> list[Answer]:
        with self.store.connect() as connection:
            rows = connection.execute(f"SELECT * FROM answers WHERE {condition} ORDER BY id", values).fetchall()
            parts = {
                row["id"]: connection.execute("SELECT * FROM answered WHERE answer = ? ORDER BY rowid", (row["id"],))
                for row in rows
            }
            return [
                Answer(
                    id=row["id"],
                    image=row["image"],
                    raw=row["raw"],
                    raw_sha256=row["raw_sha256"],
                    info=json.loads(row["info"]),
                    client=row["client"],
                    regions=[
                        AnsweredRegion(part["query"], to_region({**dict(part), "image": row["image"]}))
                        for part in parts[row["id"]]
                    ],
                    submitted=row["submitted"],
                    active=bool(row["active"]),
                )
                for row in rows
            ]

    def regions(self) -> dict[str, list[Region]]:
        """Regions that are annotated, by image."""
        boxes: dict[str, list[Region]] = {}
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT answers.image, answered.* FROM answered JOIN answers ON answers.id = answered.answer"
                " WHERE answers.active = 1 ORDER BY answers.id"
            ).fetchall()
        for row in rows:
            boxes.setdefault(row["image"], []).append(to_region(row))
        return {image: list(dict.fromkeys(regions)) for image, regions in boxes.items()}

    def images(self, withdrawn: bool = False) -> list[str]:
        """Images with an active submission, sorted; with `withdrawn`, also those with withdrawn submissions only."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT DISTINCT image FROM answers WHERE active = 1 OR ? ORDER BY image", (withdrawn,)
            ).fetchall()
        return [row[0] for row in rows]

    def mark_merged(self, image: str, answer: int, sha256: str | None = None) -> None:
        """The label on disk, of this digest, holds every submission up to `answer`."""
        with self.store.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO merged (image, answer, sha256) VALUES (?, ?, ?)", (image, answer, sha256)
            )

    def merged(self, image: str) -> Merged:
        """Newest submission that the label on disk holds, and the digest of its file; (0, None) where unknown."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT answer, sha256 FROM merged WHERE image = ?", (image,)).fetchone()
        return Merged(row["answer"], row["sha256"]) if row else Merged(0, None)

    def merged_digests(self) -> dict[str, str | None]:
        """Digest that each image's label had when it was last written; None where it was not noted."""
        with self.store.connect() as connection:
            return dict(connection.execute("SELECT image, sha256 FROM merged").fetchall())

    def is_classwise(self, image: str) -> bool:
        """Return whether an active submission of the image lists its annotated classes."""
        with self.store.connect() as connection:
            row = connection.execute(
                "SELECT 1 FROM answers WHERE image = ? AND active = 1"
                " AND json_extract(info, '$.annotated_classes') IS NOT NULL LIMIT 1",
                (image,),
            ).fetchone()
        return row is not None

    def last(self, image: str) -> int:
        """Number of the newest submission of an image, withdrawn or not; 0 when there is none."""
        with self.store.connect() as connection:
            row = connection.execute("SELECT MAX(id) FROM answers WHERE image = ?", (image,)).fetchone()
        return int(row[0] or 0)

    def unmerged(self) -> list[str]:
        """Images whose label on disk may lack a submission, since a kill came between record and merge."""
        with self.store.connect() as connection:
            rows = connection.execute(
                "SELECT image FROM answers LEFT JOIN merged USING (image) GROUP BY image"
                " HAVING MAX(answers.id) > COALESCE(merged.answer, 0) ORDER BY image"
            ).fetchall()
        return [row[0] for row in rows]


def _new_minutes(connection: sqlite3.Connection, query: int | None) -> float | None:
    """Minutes of work on a query that no earlier answer includes; None if unknown."""
    row = connection.execute(f"SELECT {UNCOUNTED} FROM queries WHERE id = ? AND worked > 0", (query,)).fetchone()
    return None if row is None else float(row[0])
