# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Regions for a request: a repeated batch, second readings, planned and freed regions first, then new ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked, Query


@dataclass(frozen=True)
class BatchRequest:
    """Fields of a request that determine which recorded regions serve it."""

    method: str
    unit: str
    round: int
    client: str
    """The annotator."""
    batch: str
    """Identifier of the batch; the same identifier returns the same regions."""
    count: int
    """Number of regions of a new batch."""
    single: bool
    """Whether the request is for one region, which may be a planned or freed one."""
    named: bool
    """Whether the request names its regions itself."""
    lease_minutes: float | None
    """Length of a lease; None records the batch as proposed, without a lease."""


class Choice(NamedTuple):
    """Newly chosen regions: a note for the client, the regions, and the places of those that are read twice."""

    note: str | None
    asked: Sequence[Asked]
    twice: Collection[int] = ()


class Served(NamedTuple):
    """A note for the client and the queries that serve its request."""

    note: str | None
    queries: list[Query]


class BatchPlanner:
    """Planner of batches, one per server: a choice depends on the taken regions, and a region goes to one client.

    `_choosing` is held while regions are chosen (seconds), `_handing_out` while they are recorded and leased
    (milliseconds, also inside of the other lock). So a planned region can be leased while a batch is being chosen.
    """

    def __init__(self, ledger: QueryLedger) -> None:
        self.ledger = ledger
        self._choosing, self._handing_out = threading.Lock(), threading.Lock()

    def serve(
        self, request: BatchRequest, choose: Callable[[int], Choice], recorded: Callable[[list[Query]], None]
    ) -> Served:
        """Return the regions of a request; regions are chosen only if no recorded region serves it.

        Args:
            request: see `BatchRequest`.
            choose: function from a number to at most as many new regions.
            recorded: callback for the new queries before any of them is leased.

        Raises:
            PatchwiseError: 4xx, from `choose`.
        """
        if found := self._serve_recorded(request):
            return Served(None, found)
        with self._choosing:
            # Another request may have planned a region for this one in the meantime.
            if found := self._serve_recorded(request):
                return Served(None, found)
            second = self._second_readings(request)
            self.ledger.withdraw_planned(request.round)
            left = request.count - len(second)
            choice = choose(left) if left else Choice(None, [])
            return Served(choice.note, self._record(request, choice, second, recorded))

    def _serve_recorded(self, request: BatchRequest) -> list[Query]:
        with self._handing_out:
            return self._hand_out(request, self._recorded(request))

    def _recorded(self, request: BatchRequest) -> list[Query]:
        """Recorded queries that serve a request: its own batch, else one second reading, planned or freed region."""
        ledger = self.ledger
        known = ledger.batch(request.batch)
        if known or not request.single:
            return known
        found = [] if request.named else ledger.leases.second_readings(request.client, 1)
        found = found or ledger.proposed(request.method, request.round, request.unit, 1)
        return found or ledger.leases.freed(request.method, request.round, request.unit, request.client)

    def _second_readings(self, request: BatchRequest) -> list[Query]:
        if request.single or request.named or request.lease_minutes is None:
            return []
        return self.ledger.leases.second_readings(request.client, request.count)

    def _record(
        self,
        request: BatchRequest,
        choice: Choice,
        second: Sequence[Query],
        recorded: Callable[[list[Query]], None],
    ) -> list[Query]:
        ledger = self.ledger
        with self._handing_out:
            queries = ledger.ask(request.batch, request.method, request.round, choice.asked, choice.twice)
            recorded(queries)
            if second:
                free = {query.id for query in ledger.leases.second_readings(request.client, len(second))}
                ledger.join_batch([query.id for query in second if query.id in free], request.batch)
                queries = ledger.batch(request.batch)
            return self._hand_out(request, queries[:1] if request.single else queries)

    def _hand_out(self, request: BatchRequest, queries: list[Query]) -> list[Query]:
        if request.lease_minutes is None or not queries:
            return queries
        return self.ledger.leases.lease([query.id for query in queries], request.client, request.lease_minutes)
