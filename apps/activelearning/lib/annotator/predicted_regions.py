# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Predictions of the model inside of regions, stored before any answer: `proposals/<query>.npz`."""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lib.ledger.records import Query
from lib.models.checkpoints import Model
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import DEEP_ENSEMBLE, PosteriorSpec
from lib.storage.atomic_files import write_atomic

logger = logging.getLogger(__name__)


class PredictedRegions:
    """Store of argmax_c of the mean posterior of every queried region, with the digest of its model.

    Only images with cached moments have predictions to compare an answer with. They are written after the request that
    chose the regions. If a kill prevents a write, the prediction stays missing and the estimates lack one region.

    Args:
        folder: folder of the predictions.
        cache: moments of the posterior.
    """

    def __init__(self, folder: Path, cache: MomentsCache) -> None:
        self.folder = folder
        self.cache = cache
        self._listed: tuple[int, set[int]] = (-1, set())
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="proposals")

    def keep(self, queries: Sequence[Query], model: Model | None, spec: PosteriorSpec = DEEP_ENSEMBLE) -> None:
        """Schedule the storage of the predictions of `model` for these regions; without a model, do nothing."""
        if model is not None:
            self._writing.submit(self._store, list(queries), model, spec)

    def wait(self) -> None:
        """Wait until all scheduled predictions are stored."""
        self._writing.submit(int).result()

    def get(self, query_id: int) -> NDArray[np.uint8] | None:
        """Class ids predicted for a query's region, background 0; None if none were stored."""
        try:
            with np.load(self._path(query_id)) as arrays:
                return np.asarray(arrays["label_xyz"])
        except (FileNotFoundError, zipfile.BadZipFile):
            return None

    def model(self, query_id: int) -> str | None:
        """Digest of the model whose prediction is stored for a query."""
        try:
            with np.load(self._path(query_id)) as arrays:
                return str(arrays["model"])
        except (FileNotFoundError, zipfile.BadZipFile):
            return None

    def listed(self) -> set[int]:
        """Queries with a stored prediction; the folder is read again only after a change."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return set()
        if changed != self._listed[0]:
            names = (name.removesuffix(".npz") for name in os.listdir(self.folder))
            found = {int(name) for name in names if name.isdigit()}
            # A folder changed within the clock's grain could change again unseen, so it is not remembered yet.
            self._listed = (changed if time.time_ns() - changed > 20_000_000 else -1, found)
        return self._listed[1]

    def _store(self, queries: Sequence[Query], model: Model, spec: PosteriorSpec) -> None:
        try:
            for image in sorted({query.region.image for query in queries}):
                predicted_xyz = self._predicted(model, image, spec)
                if predicted_xyz is None:
                    continue
                for query in (q for q in queries if q.region.image == image and q.twin is None):
                    label_xyz = predicted_xyz[query.region.slices]
                    write_atomic(self._path(query.id), partial(_save, label_xyz, model.digest))
        except Exception:
            # No request waits for this thread: the page lacks these regions, annotation continues.
            logger.exception("proposals of queries %s were not kept", ", ".join(str(query.id) for query in queries))

    def _predicted(self, model: Model, image: str, spec: PosteriorSpec) -> NDArray[np.uint8] | None:
        for wanted in dict.fromkeys((spec, DEEP_ENSEMBLE)):
            try:
                return self.cache.load(model, image, wanted).predicted()
            except FileNotFoundError:
                continue
        return None

    def _path(self, query_id: int) -> Path:
        return self.folder / f"{query_id}.npz"


def _save(label_xyz: NDArray[np.uint8], model: str, stream: BinaryIO) -> None:
    np.savez_compressed(stream, label_xyz=label_xyz, model=np.array(model))
