# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Tables of the ledger, and the way there from the tables of earlier versions."""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 3

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
    lease_until REAL,
    lease_minutes REAL,
    opened REAL,
    worked REAL NOT NULL DEFAULT 0,
    twin INTEGER,
    note TEXT
);
CREATE INDEX IF NOT EXISTS queries_by_image ON queries (image, status);
CREATE INDEX IF NOT EXISTS queries_by_status ON queries (status, lease_until);
CREATE INDEX IF NOT EXISTS queries_by_batch ON queries (batch, rank);
CREATE INDEX IF NOT EXISTS queries_by_client ON queries (client, status);
CREATE INDEX IF NOT EXISTS queries_by_twin ON queries (twin);
CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, seen REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    query INTEGER,
    answer INTEGER,
    client TEXT,
    note TEXT
);
CREATE INDEX IF NOT EXISTS events_by_query ON events (query);
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
CREATE INDEX IF NOT EXISTS answered_by_query ON answered (query);
CREATE TABLE IF NOT EXISTS agreement (
    answer INTEGER NOT NULL REFERENCES answers (id),
    other INTEGER NOT NULL REFERENCES answers (id),
    x INTEGER NOT NULL, y INTEGER NOT NULL, z INTEGER NOT NULL,
    dx INTEGER NOT NULL, dy INTEGER NOT NULL, dz INTEGER NOT NULL,
    name TEXT NOT NULL,
    dice REAL,
    voxels INTEGER NOT NULL,
    other_voxels INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS agreement_by_answer ON agreement (answer);
CREATE TABLE IF NOT EXISTS merged (image TEXT PRIMARY KEY, answer INTEGER NOT NULL, sha256 TEXT);
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

# Statements that turn the tables of a version into those of the next; new tables are made by SCHEMA.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE queries ADD COLUMN lease_minutes REAL",
        "ALTER TABLE queries ADD COLUMN opened REAL",
        "ALTER TABLE queries ADD COLUMN worked REAL NOT NULL DEFAULT 0",
        "ALTER TABLE queries ADD COLUMN twin INTEGER",
        "ALTER TABLE queries ADD COLUMN note TEXT",
        "CREATE INDEX IF NOT EXISTS answered_by_query ON answered (query)",
        "UPDATE queries SET lease_minutes = (lease_until - leased) / 60",
        "UPDATE queries SET worked = 60 * COALESCE((SELECT SUM(minutes) FROM answered WHERE query = queries.id), 0)",
    ),
    2: ("ALTER TABLE merged ADD COLUMN sha256 TEXT",),
}


# Minutes of work of a query's holder that no answer includes yet. `worked` restarts at 0 with another holder, so
# answers of earlier holders are not subtracted.
UNCOUNTED = """worked / 60 - COALESCE((
    SELECT SUM(answered.minutes) FROM answered JOIN answers ON answers.id = answered.answer
    WHERE answered.query = queries.id AND answers.submitted > COALESCE(queries.leased, 0)
), 0)"""


def prepare(connection: sqlite3.Connection) -> int:
    """Create or migrate the tables inside the caller's transaction; return the found version.

    A version newer than this program's is left untouched.
    """
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
    row = connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() if known else None
    found = int(row[0]) if row else SCHEMA_VERSION
    if found > SCHEMA_VERSION:
        return found
    for version in range(found, SCHEMA_VERSION):
        for statement in MIGRATIONS[version]:
            connection.execute(statement)
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
    return found
