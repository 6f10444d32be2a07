# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The choice of regions for one request: its pool, its evidence and a call of the query engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lib.adapters.batch_planner import Choice
from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.pool_evidence import DescriptorEvidence, ModelEvidence, spec_of
from lib.annotator.explanations import Explanations, draw
from lib.annotator.predicted_regions import PredictedRegions
from lib.errors import refuse
from lib.ledger.records import Asked, Query
from lib.models.checkpoints import Model
from lib.options import AppOptions
from lib.prediction.moments_cache import MomentsCache
from lib.querying.methods import QueryMethod
from lib.querying.selection import PoolExhausted, PoolImage, select
from lib.randomness import child_rng
from lib.regions import Region, Triple, millimetres_to_voxels
from lib.studies.datastore import PartialLabelDatastore

logger = logging.getLogger(__name__)


Millimetres = Annotated[float, Field(gt=0, le=1e6)]


class QueryRequest(BaseModel):
    """Fields that every method takes; the registry checks the options of a method."""

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


def _nobody(bundle: str, method: QueryMethod) -> bool:
    return False


@dataclass(frozen=True)
class ChoiceParts:
    """Parts of the app that a choice uses."""

    classes: dict[str, int]
    """Class name -> id."""
    options: AppOptions
    segmenters: Mapping[str, SegmentationTask]
    """Segmentation tasks by bundle name; the first is the default."""
    cache: MomentsCache
    """Moments of the pool."""
    reasons: Explanations
    """Store of the pictures and reasons of queries."""
    proposals: PredictedRegions
    """Store of the predicted label maps of queries."""
    score_missing: Callable[[str, QueryMethod], bool] = _nobody
    """Start of a scoring for a bundle and a method; returns whether images will be scored."""


def no_image(datastore: PartialLabelDatastore) -> str:
    """The refusal of a request that finds no image to work on."""
    left_out = datastore.left_out()
    if not left_out:
        return f"the pool is empty: no image in {datastore.name()}; put images there first"
    return (
        f"the pool is empty: none of {len(left_out)} files in {datastore.name()} can be used, first: "
        f"{next(iter(left_out.values()))}"
    )


class RegionChoice:
    """One request for regions of one method, on the pool as it is now.

    Raises:
        PatchwiseError: 4xx with a sentence: an unknown model, or none where the method needs one.
    """

    def __init__(
        self, parts: ChoiceParts, method: QueryMethod, wanted: QueryRequest, datastore: PartialLabelDatastore
    ) -> None:
        self.parts = parts
        self.method = method
        self.wanted = wanted
        self.datastore = datastore
        self.segmenter = self._segmenter()
        self.model = self._model()
        self.round = wanted.round if wanted.round is not None else (self.model.round + 1 if self.model else 0)
        self._shown: ModelEvidence | None = None
        self._unscored: str | None = None

    def choose(self, count: int) -> Choice:
        """Return up to `count` regions.

        Raises:
            PatchwiseError: 4xx with a sentence: an empty pool, missing scores, a request that names an unusable image.
        """
        self._refuse_left_out()
        while True:
            pool, evidence = self._look()
            note, asked = self._select(pool, evidence, count)
            # Of a scored image the voxels have been read. Each turn leaves an image out, so this ends.
            if self.method.posterior or not self.datastore.unusable(sorted({a.region.image for a in asked})):
                break
        self._shown = evidence if isinstance(evidence, ModelEvidence) else None
        return Choice(note, asked, self._twice(len(asked)))

    def prepare(self, count: int) -> None:
        """Fill the caches that the first choice after a scoring would fill.

        Raises:
            PatchwiseError: 4xx with a sentence.
        """
        self._select(*self._look(), count)

    def keep(self, queries: list[Query]) -> None:
        """Keep the picture and the predicted label map of each new query."""
        regions = [query.region for query in queries]
        self.parts.reasons.keep(queries, lambda: draw(self.method, regions, self.datastore, self._shown))
        self.parts.proposals.keep(queries, self.model, spec_of(self.method))

    def _twice(self, count: int) -> list[int]:
        """Positions in the batch with a second reading; a fraction of a region is rounded at random."""
        share = self.parts.options.double_share if self.wanted.double_share is None else self.wanted.double_share
        rng = child_rng(self.wanted.seed, self.round, "double")
        number = min(count, int(share * count + rng.random()))
        return sorted(rng.permutation(count)[:number].tolist())

    def _select(
        self, pool: Sequence[PoolImage], evidence: ModelEvidence | DescriptorEvidence, count: int
    ) -> tuple[str | None, list[Asked]]:
        started, wanted, method = time.time(), self.wanted, self.method
        note = None
        size = None if wanted.regions else self._size(pool)
        try:
            picks = select(
                method,
                pool,
                evidence,
                count,
                size=size,
                seed=wanted.seed,
                round_=self.round,
                axis=wanted.axis,
                stride=wanted.stride,
                n_per_image=wanted.n_per_image,
                rounds_total=wanted.rounds,
                utilities=wanted.utilities,
                hints=wanted.hints,
                regions=wanted.regions,
                labels=self.parts.classes,
            )
        except PoolExhausted as exhausted:
            picks, note = exhausted.picks, str(exhausted)
        logger.info("%s chose %d regions in %.3f s", method.name, len(picks), time.time() - started)
        if method.unit == "patch" and size is not None and any(pick.size != size for pick in picks):
            clipped = f"patches of {list(size)} voxels were clipped to the size of smaller images"
            note = clipped if note is None else f"{note}; {clipped}"
        if self._unscored is not None:
            note = self._unscored if note is None else f"{note}; {self._unscored}"
        return note, [
            Asked(
                region=Region(pick.image, pick.start, pick.size),
                unit=pick.unit,
                score=pick.score if math.isfinite(pick.score) else None,
                reason=pick.reason,
            )
            for pick in picks
        ]

    def _segmenter(self) -> SegmentationTask:
        known = self.parts.segmenters
        name = self.wanted.model or next(iter(known))
        if name not in known:
            refuse(f"no model {name!r}; known models are {', '.join(known)}", 404)
        return known[name]

    def _model(self) -> Model | None:
        model, method = self.segmenter.store.current(), self.method
        if model is None and method.posterior:
            name = self.segmenter.store.bundle
            refuse(
                f"{method.name} needs a trained model and {name} has none yet; annotate regions of 'random' or "
                f"'starting_budget' first, then POST /train/{name} and POST /scoring/predictive_entropy",
                409,
            )
        return model

    def _look(self) -> tuple[list[PoolImage], ModelEvidence | DescriptorEvidence]:
        """The pool as it is now, and the evidence about it."""
        parts, method, model, datastore = self.parts, self.method, self.model, self.datastore
        files, grids = datastore.pool()
        if not files:
            refuse(no_image(datastore), 409)
        taken = {image: tuple(region.box for region in regions) for image, regions in datastore.ledger.taken().items()}
        pool = [
            PoolImage(id=image, shape=grid.shape, spacing=grid.spacing, taken=taken.get(image, ()))
            for image, grid in grids.items()
        ]
        if model is None:
            return pool, DescriptorEvidence(datastore)
        if method.uncertainty == "learning_loss" and not model.facts.recipe.learning_loss:
            refuse('the current model predicts no loss; POST /train with {"learning_loss": 1} and score again', 409)
        spec = spec_of(method)
        digests = datastore.digests(files) if method.posterior else {}
        missing = set(parts.cache.missing(model, digests, spec))
        if missing:
            self._note_missing(sorted(missing), len(pool))
            pool = [image for image in pool if image.id not in missing]
            digests = {image: digest for image, digest in digests.items() if image not in missing}
        return pool, ModelEvidence(parts.cache, model, spec, digests, self.segmenter, datastore, parts.classes)

    def _note_missing(self, missing: Sequence[str], total: int) -> None:
        """Have images scored that the model has not seen; the choice goes on among the others.

        Raises:
            PatchwiseError: 409: no image has been scored.
        """
        method, bundle = self.method, self.segmenter.store.bundle
        at_work = self.parts.score_missing(bundle, method)
        none = f"{len(missing)} of {total} images (first: {missing[0]}) have not been scored with the current model"
        if len(missing) == total and at_work:
            refuse(f"{none} and posterior; they are being scored, so ask again in a minute", 409)
        if len(missing) == total:
            wanted = f'POST /scoring/predictive_entropy {{"query_method": "{method.name}"}} first'
            refuse(f"{none} and posterior; {wanted}", 409)
        self._unscored = f"{none}, and are left out of this choice" + ("; they are being scored" if at_work else "")

    def _refuse_left_out(self) -> None:
        """Refuse a request that names an image which cannot be used, with the sentence about it."""
        named = {str(entry.get("image")) for entry in (*self.wanted.regions, *self.wanted.hints)}
        for sentence in self.datastore.unusable(sorted(named)).values():
            refuse(sentence)

    def _size(self, pool: Sequence[PoolImage]) -> Triple:
        if self.wanted.size_mm is not None:
            # One size for the pool, so that scores of different images mean the same: the median spacing.
            spacing = [sorted(image.spacing[axis] for image in pool)[len(pool) // 2] for axis in range(3)]
            return millimetres_to_voxels(self.wanted.size_mm, spacing)
        x, y, z = self.wanted.size or self.parts.options.size
        return x, y, z
