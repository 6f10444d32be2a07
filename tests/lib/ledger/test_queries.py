# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import time

import pytest

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.ledger.store import LedgerError
from lib.regions import Region
from tests.lib.clock import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    return QueryLedger(tmp_path / "ledger.sqlite", clock)


def asked(*starts, image="a"):
    return [
        Asked(Region(image, (s, 0, 0), (2, 2, 2)), "patch", 1.0 / (i + 1), {"rank": i}) for i, s in enumerate(starts)
    ]


def test_a_batch_is_recorded_once(ledger):
    first = ledger.ask("b1", "random", 0, asked(0, 2))
    again = ledger.ask("b1", "random", 0, asked(4, 6, 8))
    assert [q.id for q in first] == [q.id for q in again]
    assert [q.region.start for q in again] == [(0, 0, 0), (2, 0, 0)]
    assert [q.rank for q in again] == [0, 1]


def test_planned_regions_come_in_the_order_of_their_plan(ledger):
    ids = [q.id for q in ledger.ask("b1", "random", 0, asked(0, 2, 4), twice=[1])]
    ledger.ask("b2", "bald", 0, asked(6))
    assert [q.id for q in ledger.proposed("random", 0, "patch")] == ids
    assert [q.id for q in ledger.proposed("random", 0, "patch", limit=2)] == ids[:2]
    assert ledger.proposed("random", 1, "patch") == ledger.proposed("random", 0, "slice") == []


def test_a_round_is_recorded_once_with_all_that_was_asked(ledger, clock, tmp_path):
    ledger.record_round(3, "bundle", "digest", {"steps": 5, "folder": tmp_path}, {"loss": 0.5})
    clock.now += 10
    ledger.record_round(4, "other", "digest", {}, {})
    with sqlite3.connect(ledger.path) as connection:
        rows = connection.execute("SELECT round, bundle, model, request, stats, finished FROM rounds").fetchall()
    asked_for = json.dumps({"steps": 5, "folder": str(tmp_path)})
    assert rows == [(3, "bundle", "digest", asked_for, '{"loss": 0.5}', clock.now - 10)]


def test_facts_about_the_folder_are_kept(ledger):
    assert ledger.get_meta("seen") is None
    ledger.set_meta("seen", {"at": [1, None]})
    ledger.set_meta("other", 2)
    ledger.set_meta("seen", {"at": [2, None]})
    assert ledger.get_meta("seen") == {"at": [2, None]}
    assert ledger.get_meta("other") == 2


def test_infos_hold_what_json_has_no_word_for(ledger, tmp_path):
    ledger.update_info("a", {"path": tmp_path})
    ledger.update_infos({"b": {"path": tmp_path, "n": 1}}, tag="final")
    assert ledger.get_info("a") == {"path": str(tmp_path)}
    assert ledger.infos("final") == {"b": {"path": str(tmp_path), "n": 1}}


def test_a_query_tells_clients_until_when_it_is_theirs(ledger, clock):
    (query,) = ledger.ask("b1", "random", 2, asked(4))
    assert query.to_json()["lease_until"] is None
    clock.now = 86_400.0
    (leased,) = ledger.leases.lease([query.id], "ann", 60)
    assert leased.to_json() == {
        "query": query.id, "image": "a", "start": [4, 0, 0], "size": [2, 2, 2], "unit": "patch", "score": 1.0,
        "method": "random", "round": 2, "rank": 0, "reason": {"rank": 0}, "lease_until": "1970-01-02T01:00:00+00:00",
    }  # fmt: skip


def test_two_clients_never_hold_one_region(ledger):
    ids = [q.id for q in ledger.ask("b1", "random", 0, asked(0, 2))]
    ann = ledger.leases.lease(ids[:1], "ann", 60)
    ben = ledger.leases.lease(ids, "ben", 60)
    assert [q.client for q in ann] == ["ann"]
    assert [q.client for q in ben] == ["ann", "ben"]


def test_a_lease_that_runs_out_returns_to_the_pool(ledger, clock):
    ids = [q.id for q in ledger.ask("b1", "random", 0, asked(0))]
    ledger.leases.lease(ids, "ann", 60)
    clock.now += 3599
    assert ledger.leases.expire() == 0
    assert ledger.taken() == {"a": [Region("a", (0, 0, 0), (2, 2, 2))]}
    clock.now += 2
    assert ledger.leases.expire() == 1
    assert ledger.taken() == {}
    assert ledger.leases.lease(ids, "ben", 60)[0].client == "ben"


def test_regions_planned_in_an_earlier_round_are_given_back(ledger):
    old = ledger.ask("b1", "random", 0, asked(0, 2))
    ledger.leases.lease([old[0].id], "ann", 60)
    (new,) = ledger.ask("b2", "random", 1, asked(4))
    assert ledger.withdraw_planned(1) == 1
    assert [ledger.query(q.id).status for q in (*old, new)] == ["open", "withdrawn", "proposed"]
    assert [r.start[0] for r in ledger.taken()["a"]] == [0, 4]
    assert ledger.leases.lease([old[1].id], "ben", 60)[0].status == "withdrawn"


def test_last_worked_is_the_expired_region_unless_somebody_else_answered_it(ledger, clock):
    (query,) = ledger.ask("b1", "random", 0, asked(0))
    ledger.leases.lease([query.id], "ann", 1)
    clock.now += 100
    ledger.leases.expire()
    assert [q.id for q in ledger.leases.last_worked("a", "ann")] == [query.id]
    assert ledger.leases.last_worked("a", "ben") == []
    (other,) = ledger.ask("b2", "random", 0, asked(1))
    ledger.leases.lease([other.id], "ben", 60)
    ledger.answers.record("a", "a/raw.nii.gz", "0", {}, "ben", [(other.id, other.region)])
    assert ledger.leases.last_worked("a", "ann") == []
    assert [q.id for q in ledger.leases.last_worked("a", "ben")] == [other.id]


def test_a_second_thought_is_about_every_region_of_the_first(ledger):
    queries = ledger.ask("b1", "random", 0, [*asked(0), *asked(1)])
    regions = [(query.id, query.region) for query in ledger.leases.lease([q.id for q in queries], "ann", 60)]
    ledger.answers.record("a", "a/one.nii.gz", "0", {}, "ann", regions)
    assert [q.id for q in ledger.leases.last_worked("a", "ann")] == [q.id for q in queries]
    ledger.answers.record("a", "a/two.nii.gz", "0", {}, "ann", regions[1:])
    assert [q.id for q in ledger.leases.last_worked("a", "ann")] == [queries[1].id]


def test_an_answer_closes_its_query_and_records_minutes(ledger, clock):
    (query,) = ledger.ask("b1", "random", 0, asked(0))
    ledger.leases.lease([query.id], "ann", 60)
    clock.now += 90
    answer = ledger.answers.record("a", "a/raw.nii.gz", "77", {"label_info": []}, "ann", [(query.id, query.region)])
    assert ledger.query(query.id).status == "answered"
    assert ledger.answers.unmerged() == ["a"]
    ledger.answers.mark_merged("a", answer)
    assert ledger.answers.unmerged() == []
    (stored,) = ledger.answers.of_image("a")
    assert (stored.raw, stored.raw_sha256, stored.info, stored.client) == (
        "a/raw.nii.gz",
        "77",
        {"label_info": []},
        "ann",
    )
    assert stored.regions == [(query.id, query.region)]
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("SELECT minutes FROM answered").fetchall() == [(1.5,)]


def test_info_of_two_writers_is_merged(ledger):
    other = QueryLedger(ledger.path)
    ledger.update_info("a", {"x": 1})
    other.update_info("a", {"y": 2})
    ledger.update_info("a", {"z": 3}, tag="final")
    assert ledger.get_info("a") == {"x": 1, "y": 2}
    assert ledger.get_info("a", "final") == {"z": 3}
    assert ledger.get_info("b") == {}


def test_a_newer_schema_is_refused(ledger):
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(LedgerError, match="newer version"):
        QueryLedger(ledger.path)


def _write_forever(path, run):
    ledger = QueryLedger(path)
    for i in range(100_000):
        (query,) = ledger.ask(f"b{run}.{i}", "random", 0, asked(0, image=f"im{run}.{i}"))
        ledger.leases.lease([query.id], "ann", 60)
        ledger.answers.record(f"im{run}.{i}", f"{i}", "0", {}, "ann", [(query.id, query.region)])


def _open(path, barrier):
    barrier.wait()
    QueryLedger(path)


@pytest.mark.parametrize("turns", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_processes_that_make_the_ledger_at_once_all_open_it(tmp_path, turns):
    context = multiprocessing.get_context("fork")
    for turn in range(turns):
        path, barrier = tmp_path / f"{turn}.sqlite", context.Barrier(4)
        processes = [context.Process(target=_open, args=(path, barrier)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0, 0]
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_writer_killed_at_any_instant_leaves_whole_records(tmp_path):
    path = tmp_path / "ledger.sqlite"
    context = multiprocessing.get_context("spawn")
    for round_ in range(3):
        process = context.Process(target=_write_forever, args=(path, round_))
        process.start()
        deadline = time.time() + 60
        try:
            while not path.exists() or QueryLedger(path).counts().get("answered", 0) < 5 * (round_ + 1):
                assert time.time() < deadline
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        ledger = QueryLedger(path)
        counts = ledger.counts()
        assert counts.get("open", 0) + counts.get("proposed", 0) <= round_ + 1
        for image in ledger.answers.images():
            (answer,) = ledger.answers.of_image(image)
            assert ledger.query(answer.regions[0][0]).status == "answered"
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
