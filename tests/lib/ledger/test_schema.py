# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Files of earlier versions, brought up to date, and of later ones, refused."""

from __future__ import annotations

import sqlite3

import pytest

from lib.ledger.queries import QueryLedger
from lib.ledger.schema import SCHEMA_VERSION
from lib.ledger.store import LedgerError
from tests.lib.clock import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    return QueryLedger(tmp_path / "ledger.sqlite", clock)


VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE queries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, image TEXT NOT NULL,
    x INTEGER NOT NULL, y INTEGER NOT NULL, z INTEGER NOT NULL,
    dx INTEGER NOT NULL, dy INTEGER NOT NULL, dz INTEGER NOT NULL,
    unit TEXT NOT NULL, score REAL, method TEXT NOT NULL, round INTEGER NOT NULL, rank INTEGER NOT NULL,
    batch TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '{}', status TEXT NOT NULL, client TEXT, asked REAL NOT NULL,
    leased REAL, lease_until REAL
);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, image TEXT NOT NULL, raw TEXT NOT NULL, raw_sha256 TEXT NOT NULL,
    info TEXT NOT NULL, client TEXT, submitted REAL NOT NULL, active INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE answered (
    answer INTEGER NOT NULL REFERENCES answers (id), query INTEGER,
    x INTEGER NOT NULL, y INTEGER NOT NULL, z INTEGER NOT NULL,
    dx INTEGER NOT NULL, dy INTEGER NOT NULL, dz INTEGER NOT NULL, minutes REAL
);
CREATE TABLE merged (image TEXT PRIMARY KEY, answer INTEGER NOT NULL);
CREATE TABLE rounds (
    id INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL, bundle TEXT NOT NULL, model TEXT NOT NULL UNIQUE,
    request TEXT NOT NULL, stats TEXT NOT NULL, finished REAL NOT NULL
);
CREATE TABLE info (
    image TEXT NOT NULL, tag TEXT NOT NULL DEFAULT '', content TEXT NOT NULL, PRIMARY KEY (image, tag)
);
INSERT INTO meta VALUES ('schema', '1');
INSERT INTO queries VALUES (1,'a',0,0,0,2,2,2,'patch',0.5,'random',0,0,'b','{}','answered','ann',10,20,3620);
INSERT INTO queries VALUES (2,'a',2,0,0,2,2,2,'patch',0.4,'random',0,1,'b','{}','open','ann',10,20,3620);
INSERT INTO answers VALUES (1,'a','a/r.nii.gz','00','{}','ann',110,1);
INSERT INTO answered VALUES (1,1,0,0,0,2,2,2,1.5);
"""


@pytest.fixture
def version_1(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
    return path


def columns(path):
    with sqlite3.connect(path) as connection:
        tables = [t for (t,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {t: sorted(row[1] for row in connection.execute(f"PRAGMA table_info({t})")) for t in tables}


def test_a_file_of_version_1_is_brought_up_to_date_once(version_1, ledger, clock):
    clock.now = 100.0
    for _ in range(2):
        migrated = QueryLedger(version_1, clock)
    assert columns(version_1) == columns(ledger.path)
    done, running = migrated.query(1), migrated.query(2)
    assert (done.status, done.worked, done.twin) == ("answered", 90, None)
    assert (running.client, running.lease_until) == ("ann", 3620)
    clock.now = 3000.0
    assert migrated.leases.renew(2, "ann").lease_until == 3000 + 3600
    assert migrated.answers.of_image("a")[0].regions[0][0] == 1
    with sqlite3.connect(version_1) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (str(SCHEMA_VERSION),)


def test_a_migration_that_fails_changes_nothing(version_1, monkeypatch):
    before = columns(version_1)
    monkeypatch.setattr("lib.ledger.schema.SCHEMA", "CREATE TABLE broken (")
    with pytest.raises(sqlite3.OperationalError):
        QueryLedger(version_1)
    assert columns(version_1) == before


def test_a_newer_file_is_refused_and_left_alone(version_1):
    with sqlite3.connect(version_1) as connection:
        connection.execute("UPDATE meta SET value = '99'")
    before = columns(version_1)
    with pytest.raises(LedgerError, match=r"newer version \(schema 99\)"):
        QueryLedger(version_1)
    assert columns(version_1) == before


def test_a_file_of_version_2_forgets_no_merged_label(tmp_path, ledger, clock):
    path = tmp_path / "old.sqlite"
    QueryLedger(path, clock).answers.mark_merged("a", 3, "00")
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE merged DROP COLUMN sha256")
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
    migrated = QueryLedger(path, clock)
    assert columns(path) == columns(ledger.path)
    # Without a digest the label on disk is made again before it is trusted.
    assert migrated.answers.merged("a") == (3, None)
