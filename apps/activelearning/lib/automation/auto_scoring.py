# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Scorings that start by themselves: after a training, and for images that a query found without scores."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.pool_evidence import spec_of
from lib.adapters.scoring_method import AUTOMATIC
from lib.automation import background_tasks
from lib.models.checkpoints import Model
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import DEEP_ENSEMBLE, PosteriorSpec
from lib.querying.methods import QueryMethod
from lib.querying.registry import REGISTRY
from lib.studies.datastore import PartialLabelDatastore

_PAUSE_SECONDS = 10.0


class AutoScoring:
    """Looks for images without scores while no training or scoring runs, and starts one scoring at a time.

    After a training the deep ensemble is scored; other posteriors once a query has asked for them. An image
    that a scoring failed on is tried again once the model or the image changes.

    Args:
        segmenters: by bundle name, with the store of its trainings.
        store, cache: the pool and its moments.
        enabled: without it nothing is ever started.
    """

    def __init__(
        self,
        segmenters: Mapping[str, SegmentationTask],
        store: PartialLabelDatastore,
        cache: MomentsCache,
        enabled: bool,
    ) -> None:
        self.segmenters = segmenters
        self.store = store
        self.cache = cache
        self.enabled = enabled
        self.waiting = 0
        self._lock = threading.Lock()
        self._wanted: dict[tuple[str, PosteriorSpec], dict[str, Any]] = {}
        self._seen: dict[tuple[str, PosteriorSpec], object] = {}
        self._tried: set[tuple[str, PosteriorSpec, str]] = set()

    def want(self, bundle: str, method: QueryMethod) -> bool:
        """Have the images scored that a query of `method` misses; returns whether that will be done."""
        spec = spec_of(method)
        if not self.enabled or (method.name not in REGISTRY and spec != DEEP_ENSEMBLE):
            return False
        options = {} if spec == DEEP_ENSEMBLE else _asked(method)
        with self._lock:
            self._wanted[bundle, spec] = options
            self._seen.pop((bundle, spec), None)
        return True

    def tick(self) -> None:
        """Start a scoring where one is missing and no other work is going on."""
        if not self.enabled or background_tasks.is_running("train") or background_tasks.is_running("scoring"):
            return
        if background_tasks.was_stopped("scoring", _PAUSE_SECONDS):
            # A scoring that was asked for by hand is about to take the place of the one that gave way.
            return
        with self._lock:
            wanted = {**{(bundle, DEEP_ENSEMBLE): {} for bundle in self.segmenters}, **self._wanted}
        waiting = 0
        for (bundle, spec), options in wanted.items():
            model = self.segmenters[bundle].store.current()
            if model is None:
                continue
            missing = self._missing(bundle, model, spec)
            waiting = max(waiting, len(missing))
            fresh = {(model.digest, spec, digest) for digest in missing.values()} - self._tried
            if fresh:
                self._tried |= fresh
                self.waiting = waiting
                request = {"method": "predictive_entropy", "model": bundle, AUTOMATIC: True, **options}
                background_tasks.start("scoring", request)
                return
        self.waiting = waiting

    def _missing(self, bundle: str, model: Model, spec: PosteriorSpec) -> dict[str, str]:
        """Digests of the images without scores; nothing is read while model and files stay."""
        files, _ = self.store.pool()
        state = (model.digest, tuple(files.items()))
        if self._seen.get((bundle, spec)) == state:
            return {}
        digests = self.store.digests(files)
        missing = {image: digests[image] for image in self.cache.missing(model, digests, spec)}
        if not missing:
            self._seen[bundle, spec] = state
        return missing


def _asked(method: QueryMethod) -> dict[str, Any]:
    """The part of a scoring request that gives the posterior of a method."""
    names = ("passes", "dropout", "flips", "rotations", "noise")
    options = {name: method.options[name] for name in names if name in method.options}
    return {"query_method": method.name, "posterior": method.posterior, **options}
