# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What the model proposed inside of a region before anybody answered: `proposals/<query>.npz`."""

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
    """Keeps argmax_c of the mean posterior of every region that is asked about, and the digest of the model it is of.

    Only of images whose moments are cached: where no model predicts there is nothing to compare an answer with. They
    are written after the request that chose the regions; one that a kill prevents is missing for good, which costs the
    estimates one region.

    Args:
        folder: where they lie.
        cache: the posterior's moments.
    """

    def __init__(self, folder: Path, cache: MomentsCache) -> None:
        self.folder = folder
        self.cache = cache
        self._listed: tuple[int, set[int]] = (-1, set())
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="proposals")

    def keep(self, queries: Sequence[Query], model: Model | None, spec: PosteriorSpec = DEEP_ENSEMBLE) -> None:
        """Has the proposals of `model` for these regions stored, soon; none without a model."""
        if model is not None:
            self._writing.submit(self._store, list(queries), model, spec)

    def wait(self) -> None:
        """Returns when everything handed in so far is stored."""
        self._writing.submit(int).result()

    def get(self, query_id: int) -> NDArray[np.uint8] | None:
        """Class ids proposed for a query's region, background 0; None where none were kept."""
        try:
            with np.load(self._path(query_id)) as arrays:
                return np.asarray(arrays["label_xyz"])
        except (FileNotFoundError, zipfile.BadZipFile):
            return None

    def model(self, query_id: int) -> str | None:
        """Digest of the model whose proposal was kept for a query."""
        try:
            with np.load(self._path(query_id)) as arrays:
                return str(arrays["model"])
        except (FileNotFoundError, zipfile.BadZipFile):
            return None

    def listed(self) -> set[int]:
        """Queries with a proposal; the folder is read again only when it has changed."""
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
            # Nobody waits for this thread: the page lacks these regions, annotation goes on.
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
