# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The one MONAI Label strategy: turns a request into a call of the engine, and its picks into leased queries."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from monailabel.interfaces.tasks.strategy import Strategy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.pool_evidence import COMPOSE, DescriptorEvidence, ModelEvidence, spec_of
from lib.annotator.captions import cue_in_batch
from lib.annotator.explanations import Reasons, draw
from lib.annotator.predicted_regions import Proposals
from lib.errors import refuse
from lib.ledger.queries import QueryLedger
from lib.ledger.records import ANONYMOUS, Asked, Query
from lib.models.checkpoints import Model
from lib.options import AppOptions, problems
from lib.prediction.moments_cache import MomentsCache
from lib.querying.methods import QueryMethod, compose, resolve
from lib.querying.selection import PoolExhausted, PoolImage, select
from lib.randomness import child_rng
from lib.regions import Region, Triple, millimetres_to_voxels
from lib.studies.datastore import PartialLabelDatastore

logger = logging.getLogger(__name__)


Millimetres = Annotated[float, Field(gt=0, le=1e6)]


class QueryRequest(BaseModel):
    """What every method takes; the options of a method are checked by the registry."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    batch: int | None = Field(default=None, ge=1, le=10_000)
    size: tuple[int, int, int] | None = None
    size_mm: tuple[Millimetres, Millimetres, Millimetres] | None = None
    seed: int = Field(default=0, ge=0)
    round: int | None = Field(default=None, ge=0)
    rounds: int | None = Field(default=None, ge=1)
    client_id: str | None = Field(default=None, max_length=200)
    request_id: str | None = Field(default=None, max_length=200)
    model: str | None = None
    lease_minutes: float | None = Field(default=None, gt=0, le=100_000)
    double_share: float | None = Field(default=None, ge=0, le=1)
    axis: int = Field(default=2, ge=0, le=2)
    stride: tuple[int, int, int] = (1, 1, 1)
    n_per_image: int | None = Field(default=None, ge=1)
    utilities: bool = False
    hints: list[dict[str, Any]] = Field(default_factory=list)
    regions: list[dict[str, Any]] = Field(default_factory=list)


class QueryStrategy(Strategy):
    """One query method by its registry name."""

    def __init__(
        self,
        method: str,
        description: str,
        classes: dict[str, int],
        options: AppOptions,
        segmenters: Mapping[str, SegmentationTask],
        cache: MomentsCache,
        reasons: Reasons,
        proposals: Proposals,
    ) -> None:
        super().__init__(description)
        self.method = method
        self.classes = classes
        self.options = options
        self.segmenters = segmenters
        self.cache = cache
        self.reasons = reasons
        self.proposals = proposals

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any] | None:
        """Regions for the client, leased to it; None when nothing is left to ask.

        With `batch` n regions are chosen. Without, one region is handed out: the next of the batch planned before, one
        that was given back, or the first of a new batch. Regions that wait for a second reading by somebody else come
        first. The same `request_id` again gives the same regions.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        method, wanted = self._method(request), _parse(request)
        datastore.ledger.expire()
        note, queries = self._queries(method, wanted, datastore)
        return self._answer(queries, note, datastore) if queries else None

    def plan(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> list[Query]:
        """Chooses a batch and records it as proposed, for whoever asks next; the same `request_id` chooses it once.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        return self._queries(self._method(request), _parse(request), datastore, lease=False)[1]

    def _queries(
        self, method: QueryMethod, wanted: QueryRequest, datastore: PartialLabelDatastore, lease: bool = True
    ) -> tuple[str | None, list[Query]]:
        ledger = datastore.ledger
        model = self._model(wanted, method)
        round_ = self._round(wanted, model)
        client = wanted.client_id or ANONYMOUS
        minutes = wanted.lease_minutes or self.options.lease_minutes
        batch = wanted.request_id or uuid.uuid4().hex

        def hand_out(queries: Sequence[Query]) -> list[Query]:
            if not lease:
                return list(queries)
            return ledger.lease([query.id for query in queries], client, minutes) if queries else []

        with datastore.handing_out:
            handed = hand_out(self._planned(method, wanted, round_, client, batch, ledger))
        if handed:
            return None, handed
        with datastore.choosing:
            # Whoever chose while this request waited may have planned a region for it too.
            with datastore.handing_out:
                handed = hand_out(self._planned(method, wanted, round_, client, batch, ledger))
            if handed:
                return None, handed
            second = list[Query]()
            if wanted.batch and not wanted.regions and lease:
                second = ledger.second_readings(client, wanted.batch)
            ledger.withdraw_planned(round_)
            note, asked, evidence = None, list[Asked](), None
            left = (wanted.batch or self.options.batch) - len(second)
            if left:
                pool, evidence = self._look(method, wanted, model, datastore)
                note, asked = self._choose(method, wanted, pool, evidence, round_, left)
                if not method.posterior:
                    datastore.check_readable(sorted({a.region.image for a in asked}))
            with datastore.handing_out:
                recorded = ledger.ask(batch, method.name, round_, asked, self._twice(wanted, round_, len(asked)))
                self._draw(method, recorded, datastore, evidence)
                self.proposals.keep(recorded, model, spec_of(method))
                if second:
                    free = {query.id for query in ledger.second_readings(client, len(second))}
                    ledger.join_batch([query.id for query in second if query.id in free], batch)
                    recorded = ledger.batch(batch)
                return note, hand_out(recorded if wanted.batch else recorded[:1])

    def _planned(
        self, method: QueryMethod, wanted: QueryRequest, round_: int, client: str, batch: str, ledger: QueryLedger
    ) -> list[Query]:
        """What is handed out without choosing: the batch of a repeated request, or the next region for who asks singly.

        Regions that wait for a second reading come first, then planned ones, then those that were given back.
        """
        known = ledger.batch(batch)
        if known or wanted.batch is not None:
            return known
        found = [] if wanted.regions else ledger.second_readings(client, 1)
        found = found or ledger.proposed(method.name, round_, method.unit, 1)
        return found or ledger.freed(method.name, round_, method.unit, client)

    def prepare(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> None:
        """Does what the first query after a scoring would do and keeps what images offer, so that none waits for it.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        method, wanted = self._method(request), _parse(request)
        model = self._model(wanted, method)
        pool, evidence = self._look(method, wanted, model, datastore)
        self._choose(method, wanted, pool, evidence, self._round(wanted, model), wanted.batch or self.options.batch)

    def _method(self, request: dict[str, Any]) -> QueryMethod:
        return compose(request) if self.method == COMPOSE else resolve(self.method, request)

    def _round(self, wanted: QueryRequest, model: Model | None) -> int:
        return wanted.round if wanted.round is not None else (model.round + 1 if model else 0)

    def _draw(
        self,
        method: QueryMethod,
        queries: list[Query],
        datastore: PartialLabelDatastore,
        evidence: ModelEvidence | DescriptorEvidence | None,
    ) -> None:
        regions = [query.region for query in queries]
        shown = evidence if isinstance(evidence, ModelEvidence) else None
        self.reasons.keep(queries, lambda: draw(method, regions, datastore, shown))

    def _twice(self, wanted: QueryRequest, round_: int, count: int) -> list[int]:
        """Places in the batch of the regions that are read twice; a fraction of a region is drawn by chance."""
        share = self.options.double_share if wanted.double_share is None else wanted.double_share
        rng = child_rng(wanted.seed, round_, "double")
        number = min(count, int(share * count + rng.random()))
        return sorted(rng.permutation(count)[:number].tolist())

    def _choose(
        self,
        method: QueryMethod,
        wanted: QueryRequest,
        pool: Sequence[PoolImage],
        evidence: ModelEvidence | DescriptorEvidence,
        round_: int,
        count: int,
    ) -> tuple[str | None, list[Asked]]:
        started = time.time()
        note = None
        size = None if wanted.regions else self._size(wanted, pool)
        try:
            picks = select(
                method,
                pool,
                evidence,
                count,
                size=size,
                seed=wanted.seed,
                round_=round_,
                axis=wanted.axis,
                stride=wanted.stride,
                n_per_image=wanted.n_per_image,
                rounds_total=wanted.rounds,
                utilities=wanted.utilities,
                hints=wanted.hints,
                regions=wanted.regions,
                labels=self.classes,
            )
        except PoolExhausted as exhausted:
            picks, note = exhausted.picks, str(exhausted)
        logger.info("%s chose %d regions in %.3f s", method.name, len(picks), time.time() - started)
        if method.unit == "patch" and size is not None and any(pick.size != size for pick in picks):
            clipped = f"patches of {list(size)} voxels were clipped to the size of smaller images"
            note = clipped if note is None else f"{note}; {clipped}"
        return note, [
            Asked(
                region=Region(pick.image, pick.start, pick.size),
                unit=pick.unit,
                score=pick.score if math.isfinite(pick.score) else None,
                reason=pick.reason,
            )
            for pick in picks
        ]

    def _model(self, wanted: QueryRequest, method: QueryMethod) -> Model | None:
        name = wanted.model or next(iter(self.segmenters))
        if name not in self.segmenters:
            refuse(f"no model {name!r}; known models are {', '.join(self.segmenters)}", 404)
        model = self.segmenters[name].store.current()
        if model is None and method.posterior:
            refuse(
                f"{method.name} needs a trained model and {name} has none yet; annotate regions of 'random' or "
                f"'starting_budget' first, then POST /train/{name} and POST /scoring/predictive_entropy",
                409,
            )
        return model

    def _look(
        self,
        method: QueryMethod,
        wanted: QueryRequest,
        model: Model | None,
        datastore: PartialLabelDatastore,
    ) -> tuple[list[PoolImage], ModelEvidence | DescriptorEvidence]:
        """The pool as it is now, and what is known about it."""
        files = datastore.image_files()
        if not files:
            refuse(f"the pool is empty: no image in {datastore.name()}; put images there first", 409)
        taken = {image: tuple(region.box for region in regions) for image, regions in datastore.ledger.taken().items()}
        pool = [
            PoolImage(id=image, shape=grid.shape, spacing=grid.spacing, taken=taken.get(image, ()))
            for image, grid in datastore.geometries(files).items()
        ]
        segmenter = self.segmenters[wanted.model or next(iter(self.segmenters))]
        if model is None:
            return pool, DescriptorEvidence(datastore)
        if method.uncertainty == "learning_loss" and not model.facts["recipe"].get("learning_loss"):
            refuse('the current model predicts no loss; POST /train with {"learning_loss": 1} and score again', 409)
        spec = spec_of(method)
        digests = datastore.digests(files) if method.posterior else {}
        missing = self.cache.missing(model, digests, spec)
        if missing:
            refuse(
                f"{len(missing)} of {len(pool)} images (first: {missing[0]}) have not been scored with the current "
                f'model and posterior; POST /scoring/predictive_entropy {{"query_method": "{method.name}"}} first',
                409,
            )
        return pool, ModelEvidence(self.cache, model, spec, digests, segmenter, datastore, self.classes)

    def _size(self, wanted: QueryRequest, pool: Sequence[PoolImage]) -> Triple:
        if wanted.size_mm is not None:
            # One size for the pool, so that scores of different images mean the same: the median spacing.
            spacing = [sorted(image.spacing[axis] for image in pool)[len(pool) // 2] for axis in range(3)]
            return millimetres_to_voxels(wanted.size_mm, spacing)
        x, y, z = wanted.size or self.options.size
        return x, y, z

    def _answer(self, queries: list[Query], note: str | None, datastore: PartialLabelDatastore) -> dict[str, Any]:
        first = queries[0]
        answer = {
            "id": first.region.image,
            # Slicer shows this as the name of the volume: the one place where an unmodified client shows text.
            "PatientID": cue_in_batch(first, datastore.ledger, *datastore.geometry(first.region.image)),
            "regions": [query.to_json() for query in queries],
        }
        return answer | ({"note": note} if note else {})


def _parse(request: Mapping[str, Any]) -> QueryRequest:
    try:
        return QueryRequest.model_validate(request)
    except ValidationError as error:
        refuse(f"request {problems(error)}")
