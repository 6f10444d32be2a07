# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import sqlite3

import pytest

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.ledger.store import LeaseError
from lib.regions import Region
from tests.lib.clock import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock):
    return QueryLedger(tmp_path / "ledger.sqlite", clock)


def ask(ledger, *starts, image="a", batch="b", twice=(), round_=0):
    asked = [Asked(Region(image, (s, 0, 0), (2, 2, 2)), "patch", 1.0, {}) for s in starts]
    return [q.id for q in ledger.ask(batch, "random", round_, asked, twice)]


def answer(ledger, query, client="ann"):
    return ledger.answers.record("a", "r", "0", {}, client, [(query, ledger.query(query).region)])


def events(ledger):
    with sqlite3.connect(ledger.path) as connection:
        return connection.execute("SELECT kind, query, client, note FROM events ORDER BY id").fetchall()


def worked(ledger, query):
    with sqlite3.connect(ledger.path) as connection:
        return connection.execute("SELECT worked FROM queries WHERE id = ?", (query,)).fetchone()[0]


def test_work_renews_a_lease_and_the_longer_one_stays(ledger, clock):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    clock.now += 3000
    (touched,) = ledger.leases.touch("ann", "a")
    assert touched.lease_until == clock.now + 3600
    assert ledger.leases.touch("ben", "a") == []
    assert ledger.leases.touch("ann", "b") == []
    clock.now += 3599
    assert ledger.leases.expire() == 0


def test_asking_for_more_of_an_image_renews_what_is_held_there(ledger, clock):
    first, second = ask(ledger, 0, 2)
    ledger.leases.lease([first], "ann", 60)
    clock.now += 3000
    ledger.leases.lease([second], "ann", 60)
    assert ledger.query(first).lease_until == clock.now + 3600
    clock.now += 3000
    answer(ledger, second)
    assert ledger.query(first).lease_until == clock.now + 3600


def test_renew_takes_a_freed_region_up_again_unless_it_was_asked_for_again(ledger, clock):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 1)
    clock.now += 100
    ledger.leases.expire()
    renewed = ledger.leases.renew(query, "ann")
    assert (renewed.status, renewed.lease_until) == ("open", clock.now + 60)
    clock.now += 100
    ledger.leases.expire()
    (other,) = ask(ledger, 1, batch="c")
    with pytest.raises(LeaseError, match="asked for again"):
        ledger.leases.renew(query, "ann")
    assert ledger.leases.lease([query], "ann", 60)[0].status == "expired"
    ledger.leases.lease([other], "ben", 60)
    ledger.leases.release(other, "ben")
    assert ledger.leases.renew(query, "ann").status == "open"


def test_a_renewal_counts_the_work_and_leaves_a_trail(ledger, clock):
    first, second = ask(ledger, 0, 4)
    ledger.leases.lease([first, second], "ann", 60)
    clock.now += 120
    assert ledger.leases.renew(first, "ann").lease_until == clock.now + 3600
    assert [worked(ledger, query) for query in (first, second)] == [120, 0]
    assert events(ledger)[2] == ("renewed", first, "ann", None)
    ledger.leases.release(second, "ann")
    ledger.leases.lease([second], "ben", 60)
    clock.now += 60
    assert [(q.id, q.client) for q in ledger.leases.open_queries("a")] == [(first, "ann"), (second, "ben")]
    assert [q.id for q in ledger.leases.open_queries("a", "ann")] == [first]
    assert ledger.leases.open_queries("b") == []
    assert [q.id for q in ledger.leases.open_queries(client="ben")] == [second]


def test_touching_an_image_answers_what_the_client_holds_there(ledger, clock):
    mine, bens = ask(ledger, 0, 4)
    (elsewhere,) = ask(ledger, 0, image="c", batch="c")
    ledger.leases.lease([mine], "ann", 60)
    ledger.leases.lease([bens], "ben", 60)
    ledger.leases.lease([elsewhere], "ann", 60)
    clock.now += 60
    assert [(q.id, q.opened) for q in ledger.leases.touch("ann", "a")] == [(mine, None)]
    assert [(q.id, q.opened) for q in ledger.leases.touch("ann", "a", opening=True)] == [(mine, clock.now)]
    assert [ledger.query(q).opened for q in (bens, elsewhere)] == [None, None]


def test_giving_back_and_skipping_count_the_work(ledger, clock):
    for act, start in (("release", 0), ("skip", 4)):
        (query,) = ask(ledger, start, batch=act)
        ledger.leases.lease([query], "ann", 60)
        clock.now += 90
        getattr(ledger.leases, act)(query, "ann")
        assert worked(ledger, query) == 90


def test_freed_regions_are_offered_one_at_a_time_to_those_who_may_have_them(ledger):
    first, second = ask(ledger, 0, 4)
    (twice,) = ask(ledger, 8, batch="twice", twice=[0])
    (reading,) = ledger.store.queries("twin = ?", (twice,))
    ledger.leases.lease([first, second], "ann", 60)
    for query in (first, second):
        ledger.leases.release(query, "ann")
    assert [q.id for q in ledger.leases.freed("random", 0, "patch", "ben")] == [first]
    assert [q.id for q in ledger.leases.freed("random", 0, "patch", "ben", limit=5)] == [first, second]
    # No client gets both readings of a region.
    ledger.leases.lease([twice], "ben", 60)
    ledger.leases.lease([reading.id], "carl", 60)
    ledger.leases.release(reading.id, "carl")
    assert [q.id for q in ledger.leases.freed("random", 0, "patch", "ben", limit=5)] == [first, second]
    assert [q.id for q in ledger.leases.freed("random", 0, "patch", "dora", limit=5)] == [first, reading.id, second]


def test_a_released_region_goes_to_somebody_else_and_the_trail_is_kept(ledger):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    assert ledger.leases.release(query, "ann", "lunch").status == "released"
    assert ledger.taken() == {}
    assert ledger.leases.freed("random", 0, "patch", "ann") == []
    assert [q.id for q in ledger.leases.freed("random", 0, "patch", "ben")] == [query]
    assert ledger.leases.lease([query], "ben", 60)[0].client == "ben"
    assert events(ledger) == [
        ("leased", query, "ann", None), ("released", query, "ann", "lunch"), ("leased", query, "ben", None)
    ]  # fmt: skip


def test_a_skipped_region_is_asked_of_nobody(ledger, clock):
    (query,) = ask(ledger, 0, twice=[0])
    ledger.leases.lease([query], "ann", 60)
    (second,) = ledger.leases.second_readings("ben", 5)
    skipped = ledger.leases.skip(query, "ann", "motion")
    assert (skipped.status, skipped.note) == ("skipped", "motion")
    assert ledger.query(second.id).status == "withdrawn"
    assert ledger.leases.freed("random", 0, "patch", "ben") == []
    assert [r.start for r in ledger.taken()["a"]] == [(0, 0, 0)]
    assert ledger.leases.lease([query], "ben", 60)[0].status == "skipped"


@pytest.mark.parametrize("act", ["renew", "release", "skip"])
def test_queries_that_are_not_the_clients_are_refused_in_a_sentence(ledger, act):
    work = getattr(ledger.leases, act)
    with pytest.raises(LeaseError, match="no query 9") as unknown:
        work(9, "ann")
    assert unknown.value.status == 404
    first, second = ask(ledger, 0, 2)
    with pytest.raises(LeaseError, match="not open but proposed"):
        work(first, "ann")
    ledger.leases.lease([first, second], "ann", 60)
    with pytest.raises(LeaseError, match="held by ann, not by ben") as foreign:
        work(first, "ben")
    assert foreign.value.status == 409
    answer(ledger, first)
    with pytest.raises(LeaseError, match="answered already"):
        work(first, "ann")


def test_minutes_of_a_region_that_changes_hands_are_those_of_each_holder(ledger, clock):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 600)
    clock.now += 180
    ledger.answers.withdraw(answer(ledger, query, client="ann"), "ann")
    clock.now += 1
    ledger.leases.lease([query], "ben", 600)
    clock.now += 60
    ledger.leases.touch("ben", "a")
    assert ledger.overview.minutes() == [(0, "ann", pytest.approx(3)), (0, "ben", pytest.approx(1))]
    clock.now += 60
    answer(ledger, query, client="ben")
    assert ledger.overview.minutes() == [(0, "ann", pytest.approx(3)), (0, "ben", pytest.approx(2))]


def test_minutes_are_capped_gaps_counted_once(ledger, clock):
    first, second, far = *ask(ledger, 0, 2), *ask(ledger, 0, image="b", batch="c")
    ledger.leases.lease([first, second, far], "ann", 600)
    clock.now += 60
    ledger.leases.touch("ann", "a", opening=True)
    opened = clock.now
    clock.now += 3600
    ledger.leases.touch("ann", "a", opening=True)
    clock.now += 30
    answer(ledger, first)
    assert ledger.query(first).opened == opened
    assert ledger.query(first).worked == 30 + 150 + 30
    assert ledger.query(second).worked == 30 + 150
    assert (ledger.query(far).worked, ledger.query(far).opened) == (0, None)
    assert ledger.answers.submitted(first) == clock.now
    assert ledger.answers.submitted(second) is None
    clock.now += 12
    answer(ledger, first)
    with sqlite3.connect(ledger.path) as connection:
        minutes = [row[0] for row in connection.execute("SELECT minutes FROM answered ORDER BY answer")]
    assert minutes == pytest.approx([3.5, 0.2])


def test_the_next_holder_starts_at_zero(ledger, clock):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    clock.now += 60
    ledger.leases.touch("ann", "a", opening=True)
    ledger.leases.release(query, "ann")
    clock.now += 60
    (taken,) = ledger.leases.lease([query], "ben", 60)
    assert (taken.leased, taken.opened, taken.worked) == (clock.now, None, 0)


# --- second readings --------------------------------------------------------------------------------------------------


def test_a_second_reading_goes_to_somebody_else_once_the_first_is_handed_out(ledger):
    first, other = ask(ledger, 0, 2, twice=[0])
    assert [q.id for q in ledger.proposed("random", 0, "patch")] == [first, other]
    assert ledger.leases.second_readings("ben", 5) == []
    ledger.leases.lease([first], "ann", 60)
    assert ledger.leases.second_readings("ann", 5) == []
    (second,) = ledger.leases.second_readings("ben", 5)
    assert (second.region, second.twin) == (ledger.query(first).region, first)
    assert ledger.leases.lease([second.id], "ann", 60)[0].status == "proposed"
    assert ledger.leases.lease([second.id], "ben", 60)[0].client == "ben"
    ledger.leases.release(first, "ann")
    assert ledger.leases.lease([first], "ben", 60)[0].status == "released"


def test_a_second_reading_outlives_the_round_its_plan_does_not(ledger):
    first, _ = ask(ledger, 0, 2, twice=[0, 1])
    ledger.leases.lease([first], "ann", 60)
    assert ledger.withdraw_planned(1) == 2
    (second,) = ledger.leases.second_readings("ben", 5)
    assert second.twin == first


def test_a_repeated_request_gets_the_second_readings_too(ledger):
    (first,) = ask(ledger, 0, twice=[0])
    ledger.leases.lease([first], "ann", 60)
    (second,) = ledger.leases.second_readings("ben", 5)
    ask(ledger, 4, batch="ben's")
    ledger.join_batch([second.id], "ben's")
    assert second.id in [q.id for q in ledger.batch("ben's")]
    assert [q.id for q in ledger.batch("b")] == [first]


# --- withdrawal -------------------------------------------------------------------------------------------------------


def test_a_withdrawn_answer_frees_its_query_and_comes_back(ledger):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    number = answer(ledger, query)
    ledger.answers.mark_merged("a", number)
    withdrawn = ledger.answers.withdraw(number, "ann", "wrong side")
    assert not withdrawn.active
    assert ledger.query(query).status == "expired"
    assert ledger.answers.of_image("a") == []
    assert [a.id for a in ledger.answers.of_image("a", withdrawn=True)] == [number]
    assert ledger.answers.unmerged() == ["a"]
    with pytest.raises(LeaseError, match="withdrawn already"):
        ledger.answers.withdraw(number, "ann")
    assert ledger.answers.restore(number, "ann").active
    assert ledger.query(query).status == "answered"
    with pytest.raises(LeaseError, match="not withdrawn"):
        ledger.answers.restore(number, "ann")
    with pytest.raises(LeaseError, match="no answer 77") as unknown:
        ledger.answers.withdraw(77, "ann")
    assert unknown.value.status == 404
    assert [e[0] for e in events(ledger)] == ["leased", "answered", "withdrawn", "restored"]


def test_the_trail_says_who_did_what_to_which_answer_and_why(ledger, clock):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    clock.now += 60
    number = answer(ledger, query, client="ben")
    assert ledger.answers.get(number).submitted == ledger.answers.submitted(query) == clock.now
    ledger.answers.withdraw(number, "carl", "wrong side")
    assert ledger.answers.submitted(query) is None
    assert ledger.answers.get(number + 1) is None
    ledger.answers.restore(number, "dora", "right side after all")
    with sqlite3.connect(ledger.path) as connection:
        trail = connection.execute("SELECT kind, query, client, answer, note FROM events ORDER BY id").fetchall()
    assert trail[1:] == [
        ("answered", query, "ben", number, None),
        ("withdrawn", None, "carl", number, "wrong side"),
        ("restored", None, "dora", number, "right side after all"),
    ]


def test_a_query_with_another_answer_stays_answered(ledger):
    (query,) = ask(ledger, 0)
    ledger.leases.lease([query], "ann", 60)
    first, _ = answer(ledger, query), answer(ledger, query)
    ledger.answers.withdraw(first, "ann")
    assert ledger.query(query).status == "answered"
