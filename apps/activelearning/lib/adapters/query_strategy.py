# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The one MONAI Label strategy: parses a request, calls the batch planner and formats its queries."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.tasks.strategy import Strategy
from pydantic import ValidationError

from lib.adapters.batch_planner import BatchPlanner, BatchRequest, Served
from lib.adapters.pool_evidence import COMPOSE
from lib.adapters.region_choice import ChoiceParts, QueryRequest, RegionChoice
from lib.annotator.captions import cue_in_batch
from lib.errors import refuse
from lib.ledger.records import ANONYMOUS, Query
from lib.options import problems
from lib.querying.batch_facts import batch_facts
from lib.querying.methods import QueryMethod, compose, resolve
from lib.studies.datastore import PartialLabelDatastore


class QueryStrategy(Strategy):
    """One query method by its registry name.

    Args:
        method: name in the registry.
        description: as clients show it.
        parts: see `ChoiceParts`.
        planner: shared by all strategies of a server.
    """

    def __init__(self, method: str, description: str, parts: ChoiceParts, planner: BatchPlanner) -> None:
        super().__init__(description)
        self.method = method
        self.parts = parts
        self.planner = planner

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any] | None:
        """Return regions leased to the client; None if no region is left.

        With `batch`, n regions are chosen. Otherwise the result is one region: the next of the planned batch, a
        released one, or the first of a new batch. Regions that wait for a second reading by another annotator come
        first. The same `request_id` again returns the same regions.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        method, wanted = self._method(request), _parse(request)
        datastore.ledger.leases.expire()
        served = self._serve(method, wanted, datastore)
        return _answer(served, datastore) if served.queries else None

    def plan(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> list[Query]:
        """Choose a batch and record it as proposed, for later requests; one `request_id` chooses it once.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        return self._serve(self._method(request), _parse(request), datastore, lease=False).queries

    def prepare(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> None:
        """Fill the caches that the first query after a scoring would fill, so that no request waits for them.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        wanted = _parse(request)
        choice = RegionChoice(self.parts, self._method(request), wanted, datastore)
        choice.prepare(wanted.batch or self.parts.options.batch)

    def _serve(
        self, method: QueryMethod, wanted: QueryRequest, datastore: PartialLabelDatastore, lease: bool = True
    ) -> Served:
        options, choice = self.parts.options, RegionChoice(self.parts, method, wanted, datastore)
        request = BatchRequest(
            method=method.name,
            unit=method.unit,
            round=choice.round,
            client=wanted.client_id or ANONYMOUS,
            batch=wanted.request_id or uuid.uuid4().hex,
            count=wanted.batch or options.batch,
            single=wanted.batch is None,
            named=bool(wanted.regions),
            lease_minutes=(wanted.lease_minutes or options.lease_minutes) if lease else None,
        )
        return self.planner.serve(request, choice.choose, choice.keep)

    def _method(self, request: dict[str, Any]) -> QueryMethod:
        return compose(request) if self.method == COMPOSE else resolve(self.method, request)


def _answer(served: Served, datastore: PartialLabelDatastore) -> dict[str, Any]:
    first = served.queries[0]
    shapes = {q.region.image: datastore.geometry(q.region.image)[0] for q in served.queries}
    facts, sentence = batch_facts(((q.region, q.reason) for q in served.queries), shapes)
    answer = {
        "id": first.region.image,
        # Slicer shows this as the name of the volume: the one place where an unmodified client shows text.
        "PatientID": cue_in_batch(first, datastore.ledger, *datastore.geometry(first.region.image)),
        "regions": [query.to_json() for query in served.queries],
        "batch": facts,
    }
    note = "; ".join(filter(None, (served.note, sentence)))
    return answer | ({"note": note} if note else {})


def _parse(request: Mapping[str, Any]) -> QueryRequest:
    try:
        return QueryRequest.model_validate(request)
    except ValidationError as error:
        refuse(f"request {problems(error)}")
