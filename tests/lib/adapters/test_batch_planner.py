# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The order in which recorded and newly chosen regions serve a request, and the two locks."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from lib.adapters.batch_planner import BatchPlanner, BatchRequest, Choice
from lib.ledger import QueryLedger
from lib.ledger.records import Asked
from lib.regions import Region


class Chooser:
    """Choose one region after the other along an axis, and count the calls."""

    def __init__(self, twice=()):
        self.calls, self.recorded, self.twice, self.next = [], [], twice, 0

    def choose(self, count):
        self.calls.append(count)
        places = range(self.next, self.next + count)
        self.next += count
        asked = [Asked(Region("a", (10 * k, 0, 0), (10, 10, 10)), "patch", 0.5, {}) for k in places]
        return Choice("a note", asked, self.twice)


@pytest.fixture
def planner(tmp_path):
    return BatchPlanner(QueryLedger(tmp_path / "ledger.sqlite"))


def request(client="ann", batch="b", count=3, **changes):
    wanted = BatchRequest("random", "patch", 0, client, batch, count, single=False, named=False, lease_minutes=60)
    return dataclasses.replace(wanted, **changes)


def starts(served):
    return [query.region.start[0] // 10 for query in served.queries]


def test_a_batch_is_chosen_once_and_recorded_before_it_is_leased(planner):
    chooser, statuses = Chooser(), []
    first = planner.serve(request(), chooser.choose, lambda queries: statuses.extend(q.status for q in queries))
    again = planner.serve(request(), chooser.choose, chooser.recorded.append)
    assert (starts(first), first.note, statuses) == ([0, 1, 2], "a note", ["proposed"] * 3)
    assert [query.status for query in first.queries] == ["open"] * 3
    assert (starts(again), again.note, chooser.calls, chooser.recorded) == ([0, 1, 2], None, [3], [])


def test_single_requests_take_second_readings_then_planned_then_freed_regions(planner):
    chooser = Chooser(twice=[0])
    single = {"single": True, "count": 2}
    assert starts(planner.serve(request("ann", "1", **single), chooser.choose, chooser.recorded.append)) == [0]
    assert starts(planner.serve(request("bob", "2", **single), chooser.choose, chooser.recorded.append)) == [0]
    planned = planner.serve(request("bob", "3", **single), chooser.choose, chooser.recorded.append)
    assert starts(planned) == [1]
    planner.ledger.leases.release(planned.queries[0].id, "bob")
    assert starts(planner.serve(request("cem", "4", **single), chooser.choose, chooser.recorded.append)) == [1]
    assert chooser.calls == [2]


def test_a_batch_begins_with_second_readings_of_others(planner):
    chooser = Chooser(twice=[0, 1])
    planner.serve(request("ann", "1", count=2), chooser.choose, chooser.recorded.append)
    served = planner.serve(request("bob", "2", count=3), chooser.choose, chooser.recorded.append)
    assert sorted(starts(served)) == [0, 1, 2]
    assert chooser.calls == [2, 1]


def test_a_plan_leases_nothing_and_offers_no_second_reading(planner):
    chooser = Chooser(twice=[0])
    planner.serve(request("ann", "1", count=1), chooser.choose, chooser.recorded.append)
    served = planner.serve(request("bob", "2", count=2, lease_minutes=None), chooser.choose, chooser.recorded.append)
    assert [query.status for query in served.queries] == ["proposed"] * 2
    assert starts(served) == [1, 2]


def test_a_planned_region_is_handed_out_while_a_batch_is_chosen(planner):
    chooser, begun, go = Chooser(), threading.Event(), threading.Event()
    planner.serve(request("ann", "1", count=2, lease_minutes=None), chooser.choose, chooser.recorded.append)

    def slow(count):
        begun.set()
        assert go.wait(20)
        return chooser.choose(count)

    other = threading.Thread(target=planner.serve, args=(request("bob", "2"), slow, chooser.recorded.append))
    other.start()
    try:
        assert begun.wait(20)
        served = planner.serve(request("cem", "3", single=True), pytest.fail, chooser.recorded.append)
    finally:
        go.set()
        other.join()
    assert starts(served) == [0]


def test_requests_that_wait_for_a_choice_take_from_its_batch(planner):
    chooser, begun, go, served = Chooser(), threading.Event(), threading.Event(), []

    def slow(count):
        begun.set()
        assert go.wait(20)
        return chooser.choose(count)

    def ask(client):
        served.append(planner.serve(request(client, client, single=True, count=4), slow, chooser.recorded.append))

    people = [threading.Thread(target=ask, args=(f"client {k}",)) for k in range(4)]
    for thread in people:
        thread.start()
    assert begun.wait(20)
    go.set()
    for thread in people:
        thread.join()
    assert sorted(starts(one)[0] for one in served) == [0, 1, 2, 3]
    assert chooser.calls == [4]
