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
from typing import Any

from monailabel.interfaces.tasks.strategy import Strategy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.cues import cue_in_batch
from lib.datastore import PartialLabelDatastore
from lib.engine import PoolExhausted, PoolImage, select
from lib.errors import refuse, speaking_errors
from lib.evidence import COMPOSE, DescriptorEvidence, ModelEvidence, spec_of
from lib.inference import SegmentationTask
from lib.ledger_records import ANONYMOUS, Asked, Query
from lib.methods import QueryMethod, compose, resolve
from lib.models import Model
from lib.moments_cache import MomentsCache
from lib.options import AppOptions, problems
from lib.proposals import Proposals
from lib.randomness import child_rng
from lib.reasons import Reasons, draw
from lib.regions import Region, Triple, millimetres_to_voxels

logger = logging.getLogger(__name__)


class QueryRequest(BaseModel):
    """What every method takes; the options of a method are checked by the registry."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    batch: int | None = Field(default=None, ge=1, le=10_000)
    size: tuple[int, int, int] | None = None
    size_mm: tuple[float, float, float] | None = None
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
            HTTPException: 4xx with a sentence.
        """
        with speaking_errors():
            method = compose(request) if self.method == COMPOSE else resolve(self.method, request)
            wanted = _parse(request)
            datastore.ledger.expire()
            note, queries = self._queries(method, wanted, datastore)
        return self._answer(queries, note, datastore) if queries else None

    def plan(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> list[Query]:
        """Chooses a batch and records it as proposed, for whoever asks next; the same `request_id` chooses it once.

        Raises:
            HTTPException: 4xx with a sentence.
        """
        with speaking_errors():
            method = compose(request) if self.method == COMPOSE else resolve(self.method, request)
            return self._queries(method, _parse(request), datastore, hand_out=False)[1]

    def _queries(
        self, method: QueryMethod, wanted: QueryRequest, datastore: PartialLabelDatastore, hand_out: bool = True
    ) -> tuple[str | None, list[Query]]:
        ledger = datastore.ledger
        model = self._model(wanted, method)
        round_ = wanted.round if wanted.round is not None else (model.round + 1 if model else 0)
        client = wanted.client_id or ANONYMOUS
        minutes = wanted.lease_minutes or self.options.lease_minutes
        batch = wanted.request_id or uuid.uuid4().hex
        known = ledger.batch(batch)
        if known:
            return None, ledger.lease([query.id for query in known], client, minutes) if hand_out else known
        second = [] if wanted.regions or not hand_out else ledger.second_readings(client, wanted.batch or 1)
        if wanted.batch is None:
            planned = second or ledger.proposed(method.name, round_, method.unit)
            planned = planned or ledger.freed(method.name, round_, method.unit, client)
            if planned:
                return None, ledger.lease([planned[0].id], client, minutes)
        ledger.withdraw_planned(round_)
        note, recorded = None, list[Query]()
        left = (wanted.batch or self.options.batch) - len(second)
        if left:
            evidence = self._evidence(method, wanted, model, datastore)
            note, asked = self._choose(method, wanted, datastore, evidence, round_, left)
            pictures = draw(method, [a.region for a in asked], datastore, evidence)
            recorded = ledger.ask(batch, method.name, round_, asked, self._twice(wanted, round_, len(asked)))
            self.reasons.keep(recorded, pictures)
            self.proposals.keep(recorded, model, spec_of(method))
        if second:
            ledger.join_batch([query.id for query in second], batch)
            recorded = ledger.batch(batch)
        if not hand_out:
            return note, recorded
        handed = recorded if wanted.batch else recorded[:1]
        return note, ledger.lease([query.id for query in handed], client, minutes) if handed else []

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
        datastore: PartialLabelDatastore,
        evidence: ModelEvidence | DescriptorEvidence,
        round_: int,
        count: int,
    ) -> tuple[str | None, list[Asked]]:
        pool = self._pool(datastore)
        if not pool:
            refuse(f"the pool is empty: no image in {datastore.name()}; put images there first", 409)
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

    def _evidence(
        self,
        method: QueryMethod,
        wanted: QueryRequest,
        model: Model | None,
        datastore: PartialLabelDatastore,
    ) -> ModelEvidence | DescriptorEvidence:
        segmenter = self.segmenters[wanted.model or next(iter(self.segmenters))]
        if model is None:
            return DescriptorEvidence(datastore)
        if method.uncertainty == "learning_loss" and not model.facts["recipe"].get("learning_loss"):
            refuse('the current model predicts no loss; POST /train with {"learning_loss": 1} and score again', 409)
        spec = spec_of(method)
        pool = datastore.list_images()
        missing = self.cache.missing(model, pool, spec) if method.posterior else []
        if missing:
            refuse(
                f"{len(missing)} of {len(pool)} images (first: {missing[0]}) have not been scored with the current "
                f'model and posterior; POST /scoring/predictive_entropy {{"query_method": "{method.name}"}} first',
                409,
            )
        return ModelEvidence(self.cache, model, spec, segmenter, datastore, self.classes)

    def _pool(self, datastore: PartialLabelDatastore) -> list[PoolImage]:
        taken = datastore.ledger.taken()
        pool = []
        for image in datastore.list_images():
            shape, affine = datastore.geometry(image)
            x, y, z = (float((affine[:3, axis] ** 2).sum() ** 0.5) for axis in range(3))
            boxes = tuple(region.box for region in taken.get(image, []))
            pool.append(PoolImage(id=image, shape=shape, spacing=(x, y, z), taken=boxes))
        return pool

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
