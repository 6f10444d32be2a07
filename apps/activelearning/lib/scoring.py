# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The one MONAI Label scoring method: fills the moments cache, so that choosing regions needs no network."""

from __future__ import annotations

import logging
import time
from typing import Any

from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.datastore import PartialLabelDatastore
from lib.evidence import spec_of
from lib.errors import refuse, speaking_errors
from lib.inference import SegmentationTask
from lib.methods import resolve
from lib.moments_cache import MomentsCache
from lib.posterior import DEEP_ENSEMBLE, PosteriorSpec

logger = logging.getLogger(__name__)


class MomentsScoring(ScoringMethod):
    """One posterior pass over the pool with the current model; every uncertainty reads its moments afterwards."""

    def __init__(self, uncertainty: str, segmenters: dict[str, SegmentationTask], cache: MomentsCache) -> None:
        super().__init__(f"Posterior moments of every image, from which {uncertainty} is read")
        self.segmenters = segmenters
        self.cache = cache

    def __call__(self, request: dict[str, Any], datastore: PartialLabelDatastore) -> dict[str, Any]:
        """Scores the pool with bundle `model` (default: the first one) for the posterior of `query_method`.

        Raises:
            HTTPException: 4xx: unknown model, nothing trained yet, an empty pool, an unreadable image (named).
        """
        name = str(request.get("model") or next(iter(self.segmenters)))
        if name not in self.segmenters:
            refuse(f"no model {name!r}; known models are {', '.join(self.segmenters)}", 404)
        segmenter = self.segmenters[name]
        model = segmenter.store.current()
        if model is None:
            refuse(f"{name} has not been trained yet; POST /train/{name} first", 409)
        images = datastore.list_images()
        if not images:
            refuse(f"the pool is empty: no image in {datastore.name()}; put images there first", 409)
        started = time.time()
        with speaking_errors():
            spec = _spec(request)
            computed = self.cache.fill(model, segmenter.ensemble, images, _log, spec)
        seconds = round(time.time() - started, 2)
        return {"model": model.digest, "round": model.round, "images": len(images), "computed": computed, "s": seconds}


def _spec(request: dict[str, Any]) -> PosteriorSpec:
    """The posterior of `query_method` with its options, or of `posterior`; the deep ensemble without either."""
    method = request.get("query_method") or request.get("posterior")
    if method is None:
        return DEEP_ENSEMBLE
    known = {k: v for k, v in request.items() if k not in ("method", "query_method", "model", "gpus")}
    resolved = resolve(str(request.get("query_method") or "predictive_entropy"), known)
    return spec_of(resolved)


def _log(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        logger.info("scored %d of %d images", done, total)
