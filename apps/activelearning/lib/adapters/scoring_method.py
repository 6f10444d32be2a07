# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The one MONAI Label scoring method: fills the moments cache, so that choosing regions needs no network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.pool_evidence import COMPOSE, spec_of
from lib.adapters.query_strategy import QueryStrategy
from lib.adapters.region_choice import no_image
from lib.errors import PatchwiseError, refuse
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import DEEP_ENSEMBLE, PosteriorSpec
from lib.querying.methods import compose, resolve
from lib.querying.selection import SUMMARISED
from lib.storage.volume_headers import one_line
from lib.studies.datastore import PartialLabelDatastore

logger = logging.getLogger(__name__)

# Mark of a scoring that nobody asked for by hand; one that somebody asks for takes its place.
AUTOMATIC = "automatic"


class MomentsScoring(ScoringMethod):
    """One posterior pass over the pool with the current model; every uncertainty reads its moments afterwards."""

    def __init__(
        self,
        uncertainty: str,
        segmenters: dict[str, SegmentationTask],
        cache: MomentsCache,
        strategy: Callable[[str], QueryStrategy],
        methods: Sequence[str],
    ) -> None:
        super().__init__(f"Posterior moments of every image, from which {uncertainty} is read")
        self.uncertainty = uncertainty
        self.segmenters = segmenters
        self.cache = cache
        self.strategy = strategy
        self.methods = methods

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any]:
        """Score the pool with bundle `model` (default: the first one) for the posterior of `query_method`.

        Then compute the candidates of every image for the first queries: of `query_method` if the request contains it
        and the size of the batch, else of each listed method that ranks by this uncertainty.

        Raises:
            PatchwiseError: 4xx: unknown model, nothing trained yet, a pool without an image that can be used.
        """
        name = str(request.get("model") or next(iter(self.segmenters)))
        if name not in self.segmenters:
            refuse(f"no model {name!r}; known models are {', '.join(self.segmenters)}", 404)
        segmenter = self.segmenters[name]
        model = segmenter.store.current()
        if model is None:
            refuse(f"{name} has not been trained yet; POST /train/{name} first", 409)
        files, _ = datastore.pool()
        if not files:
            refuse(no_image(datastore), 409)
        started = time.time()
        spec = _spec(request)
        left_out: dict[str, str] = {}

        def failed(image: str, error: Exception) -> None:
            if isinstance(error, PatchwiseError):
                left_out[image] = str(error)
                datastore.leave_out(image, files[image], str(error))
                return
            logger.error("%s could not be predicted", image, exc_info=error)
            left_out[image] = f"{image} could not be predicted ({one_line(error)}); check its size and spacing"

        computed = self.cache.fill(model, segmenter.ensemble, datastore.digests(files), _log, spec, failed)
        prepared = self._prepared(request, spec)
        for method in prepared:
            try:
                self.strategy(method).prepare(_known(request), datastore)
            except PatchwiseError as refused:  # the moments are there all the same
                logger.warning("queries of %s were not prepared: %s", method, refused)
        seconds = round(time.time() - started, 2)
        done = {"images": len(files) - len(left_out), "computed": computed, "prepared": prepared, "s": seconds}
        return {"model": model.digest, "round": model.round, "left_out": left_out, **done}

    def _prepared(self, request: dict[str, Any], spec: PosteriorSpec) -> list[str]:
        """Methods whose first query is prepared: those that cache candidates and use these moments."""
        asked = request.get("query_method")
        if asked:
            method = compose(_known(request)) if asked == COMPOSE else resolve(str(asked), _known(request))
            return [str(asked)] if request.get("batch") and method.selector in SUMMARISED else []
        found = [resolve(name) for name in self.methods]
        return [
            m.name
            for m in found
            if m.uncertainty == self.uncertainty and m.selector in SUMMARISED and m.posterior and spec_of(m) == spec
        ]


def _spec(request: dict[str, Any]) -> PosteriorSpec:
    """The posterior of `query_method` with its options, or of `posterior`; the deep ensemble without either."""
    method = request.get("query_method") or request.get("posterior")
    if method is None:
        return DEEP_ENSEMBLE
    name = str(request.get("query_method") or "predictive_entropy")
    return spec_of(compose(_known(request)) if name == COMPOSE else resolve(name, _known(request)))


def _known(request: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a query that is prepared."""
    return {k: v for k, v in request.items() if k not in ("method", "query_method", "gpus", AUTOMATIC)}


def _log(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        logger.info("scored %d of %d images", done, total)
