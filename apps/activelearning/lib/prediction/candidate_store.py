# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Candidate summaries on disk, beside the moments they were made of: one SQLite file a model."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lib.querying.candidate_cache import Head, ImageCandidates
from lib.querying.types import Candidate
from lib.regions import triple
from lib.storage.sqlite import log_ahead

_SCHEMA = """
CREATE TABLE IF NOT EXISTS summaries (
    key TEXT NOT NULL, image TEXT NOT NULL, digest TEXT NOT NULL, taken TEXT NOT NULL,
    best REAL NOT NULL, ceiling REAL NOT NULL, content TEXT NOT NULL, PRIMARY KEY (key, image)
) WITHOUT ROWID
"""


class SummaryFile:
    """Store of the candidates of each image; if it is lost, they are computed again.

    Args:
        path: the SQLite file, in the folder of the model's moments, so that both are removed together.
        digests: digests of the pool's files; summaries of other content or of removed images are ignored.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        self.path = path
        self.digests = digests

    @cached_property
    def _connection(self) -> sqlite3.Connection:
        """One connection per object, which exists for one request."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Closed by whichever thread lets go of this object last.
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        log_ahead(connection, 30)
        # A cache: after a power failure it is made again.
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(_SCHEMA)
        return connection

    def heads(self, key: str) -> Mapping[str, Head]:
        """Heads of every image that has a summary under `key`."""
        rows = self._connection.execute(
            "SELECT image, digest, taken, best, ceiling FROM summaries WHERE key = ?", (key,)
        ).fetchall()
        return {image: Head(*head) for image, digest, *head in rows if digest == self.digests.get(image)}

    def load(self, key: str, image: str) -> ImageCandidates:
        """One summary.

        Raises:
            KeyError: there is none under this key.
        """
        row = self._connection.execute(
            "SELECT taken, best, ceiling, content FROM summaries WHERE key = ? AND image = ?", (key, image)
        ).fetchone()
        if row is None:
            raise KeyError(image)
        taken, best, ceiling, text = row
        content = json.loads(text)
        boxes = tuple((triple(start, "start"), triple(size)) for start, size in content["taken"])
        candidates = tuple(_candidate(c) for c in content["candidates"])
        return ImageCandidates(Head(taken, best, ceiling), boxes, candidates, bool(content["complete"]))

    def save(self, key: str, image: str, summary: ImageCandidates) -> None:
        """Keep a summary in place of an older one."""
        head = summary.head
        candidates = [asdict(c) for c in summary.candidates]
        text = json.dumps({"taken": summary.taken, "candidates": candidates, "complete": summary.complete})
        self._connection.execute(
            "INSERT OR REPLACE INTO summaries VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, image, self.digests[image], head.taken, head.best, head.ceiling, text),
        )


def _candidate(content: dict[str, Any]) -> Candidate:
    start, size = triple(content.pop("start"), "start"), triple(content.pop("size"))
    return Candidate(start=start, size=size, **content)
