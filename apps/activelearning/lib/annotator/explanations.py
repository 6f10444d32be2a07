# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Reasons of queries next to the ledger: `reasons/<query>.json` and `reasons/<query>.png`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lib.annotator.thumbnails import RGB, thumbnail
from lib.ledger.records import Query
from lib.querying.methods import QueryMethod
from lib.querying.types import Evidence
from lib.regions import Region
from lib.storage.atomic_files import read_json, write_atomic, write_json
from lib.storage.volumes import load_image
from lib.studies.datastore import PartialLabelDatastore
from lib.uncertainty import SCORE_MAPS, score_map_of

logger = logging.getLogger(__name__)


class Explanations:
    """Store of the reasons of queries; pictures are drawn after the request that chose their regions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._pending: dict[int, Future[None]] = {}

    def picture(self, query_id: int) -> Path | None:
        """File of a query's picture, after a wait while it is drawn; None if there is none."""
        pending = self._pending.get(query_id)
        if pending is not None:
            wait([pending])
        path = self._file(query_id)
        return path if path.is_file() else None

    def has_picture(self, query_id: int) -> bool:
        """Return whether a query has a picture or will have one."""
        return query_id in self._pending or self._file(query_id).is_file()

    def get(self, query_id: int) -> dict[str, Any]:
        """The reason of a query; empty if none was stored."""
        return read_json(self.folder / f"{query_id}.json") or {}

    def keep(self, queries: Sequence[Query], pictures: Callable[[], Sequence[RGB]]) -> None:
        """Schedule the storage of each query's reason and picture.

        The ledger holds the reasons too: if the server is killed before, only pictures are missing.
        """
        pending = self._drawing.submit(self._store, list(queries), pictures)
        self._pending.update(dict.fromkeys((query.id for query in queries), pending))
        pending.add_done_callback(lambda _: [self._pending.pop(query.id, None) for query in queries])

    def _store(self, queries: Sequence[Query], pictures: Callable[[], Sequence[RGB]]) -> None:
        try:
            for query, rgb in zip(queries, pictures(), strict=True):
                write_json(self.folder / f"{query.id}.json", query.to_json())
                write_atomic(self._file(query.id), partial(_save, rgb))
        except Exception:
            logger.exception("pictures of queries %s were not drawn", ", ".join(str(query.id) for query in queries))

    def _file(self, query_id: int) -> Path:
        return self.folder / f"{query_id}.png"


def draw(
    method: QueryMethod, regions: Sequence[Region], datastore: PartialLabelDatastore, evidence: Evidence | None
) -> list[RGB]:
    """A picture of each region, in their order; every image and score map is read once.

    Raises:
        ImageError: an image that cannot be read.
    """
    pictures: dict[Region, RGB] = {}
    for image in sorted({region.image for region in regions}):
        image_xyz = load_image(datastore.image_path(image)).array_xyz
        score_xyz = _score_map(method, evidence, image)
        for region in regions:
            if region.image == image:
                pictures[region] = thumbnail(image_xyz, score_xyz, region.box)
    return [pictures[region] for region in regions]


def _save(rgb: RGB, stream: BinaryIO) -> None:
    Image.fromarray(rgb).save(stream, "PNG")


def _score_map(method: QueryMethod, evidence: Evidence | None, image: str) -> NDArray[np.floating[Any]] | None:
    if method.uncertainty not in SCORE_MAPS or evidence is None:
        return None
    return score_map_of(method.uncertainty, evidence.moments(image))
