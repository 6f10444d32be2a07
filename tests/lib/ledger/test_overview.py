# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The ledger's sums and lists, by hand: three people, two rounds, one answer taken back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lib.ledger.overview import AnsweredQuery
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked, iso
from lib.regions import Region
from tests.lib.clock import Clock

SIZE = (2, 3, 4)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path, clock) -> QueryLedger:
    return QueryLedger(tmp_path / "ledger.sqlite", clock)


def region(start: int, image: str = "a") -> Region:
    return Region(image, (start, 0, 0), SIZE)


def ask(
    ledger: QueryLedger, batch: str, starts: list[int], round_: int = 0, method: str = "random", **more
) -> list[int]:
    asked = [Asked(region(start), "patch", None, {}) for start in starts]
    return [query.id for query in ledger.ask(batch, method, round_, asked, **more)]


def answer(ledger: QueryLedger, query: int, client: str) -> int:
    where = ledger.query(query).region
    return ledger.answers.record(where.image, f"{query}{client}.nii.gz", "0" * 64, {}, client, [(query, where)])


def test_an_empty_ledger_has_nothing_to_tell(ledger):
    assert ledger.overview.standing() == []
    assert ledger.overview.minutes() == []
    assert ledger.overview.answered_queries() == []
    assert ledger.overview.answers_key() == "0:0:0"
    assert ledger.overview.after_round(-1) == (0, 0)
    assert ledger.overview.planned_method(0) is None
    assert ledger.overview.latest(5) == []
    assert ledger.overview.sizes() == {}
    assert ledger.answers.regions() == {}
    assert ledger.counts() == {}
    assert ledger.leases.last_holder("a") is None
    assert not ledger.was_asked("a")


def test_standing_counts_regions_and_voxels_and_sees_leases_run_out(ledger, clock):
    first, second, third, _ = ask(ledger, "b", [0, 2, 4, 6])
    (later,) = ask(ledger, "c", [8], round_=1)
    ledger.leases.lease([first, second], "ann", 60)
    ledger.leases.lease([third], "ben", 10)
    answer(ledger, first, "ann")
    clock.now += 11 * 60
    assert ledger.overview.standing() == [
        (0, "answered", "ann", 1, 24),
        (0, "expired", "ben", 1, 24),
        (0, "open", "ann", 1, 24),
        (0, "proposed", None, 1, 24),
        (1, "proposed", None, 1, 24),
    ]
    # Only reported as expired: the lease itself stays until the next cleanup.
    assert ledger.query(third).status == "open"
    assert ledger.counts() == {"answered": 1, "open": 2, "proposed": 2}
    assert ledger.query(later).round == 1


def test_a_lease_ends_after_its_last_second(ledger, clock):
    (query,) = ask(ledger, "b", [0])
    ledger.leases.lease([query], "ann", 1)
    clock.now = ledger.query(query).lease_until
    assert ledger.overview.standing() == [(0, "open", "ann", 1, 24)]
    clock.now += 0.001
    assert ledger.overview.standing() == [(0, "expired", "ann", 1, 24)]


def test_minutes_are_summed_by_round_and_client(ledger, clock):
    first, second = ask(ledger, "b", [0, 2])
    (later,) = ask(ledger, "c", [4], round_=1)
    ledger.leases.lease([first, second], "ann", 60)
    ledger.leases.touch("ann", "a", opening=True)
    clock.now += 180
    answer(ledger, first, "ann")
    ledger.leases.lease([later], "ben", 60)
    found = {(round_, client): minutes for round_, client, minutes in ledger.overview.minutes()}
    assert found[0, "ann"] == pytest.approx(3)
    assert sum(minutes for (_, client), minutes in found.items() if client == "ben") == 0


def test_the_newest_active_answer_to_a_query_counts(ledger):
    first, second = ask(ledger, "b", [0, 2], round_=3, method="power_pe")
    ledger.leases.lease([first, second], "ann", 60)
    answer(ledger, first, "ann")
    again = answer(ledger, first, "ann")
    other = answer(ledger, second, "ann")
    assert ledger.overview.answered_queries() == [
        AnsweredQuery(first, first, again, 3, "power_pe"),
        AnsweredQuery(second, second, other, 3, "power_pe"),
    ]
    ledger.answers.withdraw(again, "ann")
    ledger.answers.withdraw(other, "ann")
    assert ledger.overview.answered_queries() == [AnsweredQuery(first, first, again - 1, 3, "power_pe")]


def test_a_second_reading_belongs_to_the_first(ledger):
    (first,) = ask(ledger, "b", [0], twice=[0])
    ledger.leases.lease([first], "ann", 60)
    one = answer(ledger, first, "ann")
    (second,) = [query.id for query in ledger.leases.second_readings("ben", 1)]
    assert ledger.query(second).twin == first
    ledger.leases.lease([second], "ben", 60)
    two = answer(ledger, second, "ben")
    assert ledger.overview.answered_queries() == [
        AnsweredQuery(first, first, one, 0, "random"),
        AnsweredQuery(second, first, two, 0, "random"),
    ]


def test_every_change_of_answers_changes_their_key(ledger):
    first, second = ask(ledger, "b", [0, 2])
    ledger.leases.lease([first, second], "ann", 60)
    one, two = answer(ledger, first, "ann"), answer(ledger, second, "ann")
    both = ledger.overview.answers_key()
    assert both == f"2:2:{one + two}"
    ledger.answers.withdraw(one, "ann")
    without_one = ledger.overview.answers_key()
    assert without_one == f"2:1:{two}"
    ledger.answers.restore(one, "ann")
    ledger.answers.withdraw(two, "ann")
    # As many as before, but another one.
    assert ledger.overview.answers_key() == f"2:1:{one}"
    assert len({both, without_one, ledger.overview.answers_key()}) == 3


def test_what_comes_after_a_round_leaves_waiting_second_readings_out(ledger):
    ask(ledger, "b", [0], round_=0)
    first, _ = ask(ledger, "c", [2, 4], round_=1, twice=[0])
    assert ledger.overview.after_round(0) == (2, 0)
    assert ledger.overview.after_round(1) == (0, 0)
    ledger.leases.lease([first], "ann", 60)
    assert ledger.overview.after_round(0) == (2, 0)
    answer(ledger, first, "ann")
    assert ledger.overview.after_round(0) == (1, 1)
    assert ledger.overview.after_round(-1) == (2, 1)
    (second,) = [query.id for query in ledger.leases.second_readings("ben", 1)]
    ledger.leases.lease([second], "ben", 60)
    assert ledger.overview.after_round(0) == (2, 1)


def test_a_batch_is_done_whatever_was_asked_beside_it(ledger):
    first, second = ask(ledger, "b", [0, 2], round_=1, twice=[1])
    ledger.leases.lease([first, second], "ann", 60)
    ask(ledger, "c", [4, 6, 8], round_=1)
    assert (ledger.overview.after_round(0), ledger.overview.after_round(0, "b")) == ((5, 0), (2, 0))
    answer(ledger, first, "ann")
    answer(ledger, second, "ann")
    assert (ledger.overview.after_round(0), ledger.overview.after_round(0, "b")) == ((3, 2), (0, 2))
    (again,) = [query.id for query in ledger.leases.second_readings("ben", 1)]
    ledger.leases.lease([again], "ben", 60)
    assert ledger.overview.after_round(0, "b") == (1, 2)


def test_the_first_batch_of_a_size_is_found_among_later_rounds(ledger):
    ask(ledger, "z", [0, 2, 4], round_=0)
    ask(ledger, "y", [6], round_=1, twice=[0])
    ask(ledger, "x", [8, 10], round_=1)
    ask(ledger, "w", [12, 14], round_=2)
    assert [ledger.overview.first_batch(round_, 2) for round_ in (-1, 0, 1, 2)] == ["z", "x", "w", None]
    assert [ledger.overview.first_batch(0, regions) for regions in (1, 3)] == ["y", None]


def test_a_planned_region_is_handed_out_before_one_that_came_back(ledger):
    (back,) = ask(ledger, "b", [0], method="random")
    ledger.leases.lease([back], "ann", 60)
    assert ledger.overview.planned_method(0) is None
    ledger.leases.release(back, "ann")
    assert ledger.overview.planned_method(0) == "random"
    ask(ledger, "c", [2], method="power_pe")
    assert ledger.overview.planned_method(0) == "power_pe"
    assert ledger.overview.planned_method(1) is None


def test_the_oldest_plan_comes_first_in_its_order_of_rank(ledger, clock):
    ask(ledger, "b", [0], method="strided")
    clock.now += 1
    ask(ledger, "c", [2], method="random")
    assert ledger.overview.planned_method(0) == "strided"


def test_latest_shows_work_then_plans_then_answers(ledger, clock):
    ids = ask(ledger, "b", [0, 2, 4, 6, 8, 10])
    ledger.leases.lease(ids[:1], "ann", 60)
    clock.now += 1
    ledger.leases.lease(ids[1:2], "ben", 60)
    ledger.leases.lease(ids[2:4], "cid", 60)
    for query in ids[2:4]:
        answer(ledger, query, "cid")
    assert [query.id for query in ledger.overview.latest(10)] == [ids[1], ids[0], ids[4], ids[5], ids[3], ids[2]]
    # Half of the places are for plans at most, and the rest is filled with answers.
    assert [query.id for query in ledger.overview.latest(4)] == [ids[1], ids[0], ids[4], ids[5]]
    assert [query.id for query in ledger.overview.latest(3)] == [ids[1], ids[0], ids[4]]
    assert [query.id for query in ledger.overview.latest(1)] == [ids[1]]


def test_sizes_of_rounds_leave_out_what_was_given_up(ledger):
    ask(ledger, "b", [0, 2], round_=0)
    ask(ledger, "c", [4], round_=1, twice=[0])
    assert ledger.overview.sizes() == {0: 2, 1: 1}
    assert ledger.withdraw_planned(1) == 2
    assert ledger.overview.sizes() == {1: 1}


def test_regions_that_are_annotated_are_listed_once_by_image(ledger):
    ids = [
        query.id
        for image in "ba"
        for query in ledger.ask(image, "random", 0, [Asked(region(0, image), "patch", None, {})])
    ]
    ledger.leases.lease(ids, "ann", 60)
    for query in (*ids, ids[0]):
        last = answer(ledger, query, "ann")
    assert ledger.answers.regions() == {"b": [region(0, "b")], "a": [region(0, "a")]}
    ledger.answers.withdraw(last, "ann")
    ledger.answers.withdraw(last - 1, "ann")
    assert ledger.answers.regions() == {"b": [region(0, "b")]}


def test_who_was_handed_a_region_last(ledger, clock):
    first, second = ask(ledger, "b", [0, 2])
    assert ledger.leases.last_holder("a") is None
    ledger.leases.lease([second], "ann", 60)
    clock.now += 1
    ledger.leases.lease([first], "ben", 60)
    assert ledger.leases.last_holder("a") == "ben"
    assert ledger.leases.last_holder("b") is None


def test_what_was_asked_of_an_image_and_what_clients_noted_about_many(ledger):
    ask(ledger, "b", [0, 2], twice=[1])
    assert ledger.was_asked("a")
    assert ledger.asked("a") == [region(0), region(2)]
    assert ledger.asked("b") == []
    ledger.update_info("a", {"old": 1})
    ledger.update_infos({"a": {"x": 1}, "b": {"y": [2]}}, "tag")
    ledger.update_infos({"a": {"z": 3}}, "tag")
    assert ledger.infos("tag") == {"a": {"z": 3}, "b": {"y": [2]}}
    assert ledger.infos() == {"a": {"old": 1}}
    assert ledger.get_info("a", "tag") == {"z": 3}


def test_times_are_told_in_utc_and_seconds():
    assert iso(None) is None
    assert iso(0.9) == "1970-01-01T00:00:00+00:00"
    assert iso(1_000_000_000) == "2001-09-09T01:46:40+00:00"


def test_a_query_is_told_as_clients_read_it(ledger):
    (query,) = ask(ledger, "b", [2], round_=1)
    assert ledger.query(query).to_json() | {"lease_until": None, "reason": None} == {
        "query": query,
        "image": "a",
        "start": [2, 0, 0],
        "size": [2, 3, 4],
        "unit": "patch",
        "score": None,
        "method": "random",
        "round": 1,
        "rank": 0,
        "reason": None,
        "lease_until": None,
    }


def test_the_file_is_kept_open_where_that_is_asked_for(ledger):
    log = ledger.path.with_name(f"{ledger.path.name}-wal")
    ask(ledger, "b", [0])
    assert not log.exists()
    ledger.stay_open()
    ledger.stay_open()
    ask(ledger, "c", [2])
    assert log.stat().st_size > 0
    assert QueryLedger(ledger.path).query(2).region == region(2)


def test_an_open_file_costs_at_most_a_handle_a_concurrent_call(ledger):
    """SQLite closes no descriptor of a file that another connection has open; it uses it again."""
    ledger.stay_open()
    for _ in range(5):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: ledger.overview.minutes(), range(100)))
    mine = [file for file in psutil.Process().open_files() if Path(file.path) == ledger.path.resolve()]
    assert len(mine) <= 1 + 8
