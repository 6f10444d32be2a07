# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Reasons of queries next to the ledger: `reasons/<query>.json` and `reasons/<query>.png`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lib.datastore import PartialLabelDatastore
from lib.evidence import ModelEvidence
from lib.files import read_json, write_atomic, write_json
from lib.images import load_image
from lib.ledger_records import Query
from lib.methods import QueryMethod
from lib.regions import Region
from lib.thumbnails import RGB, thumbnail
from lib.uncertainty import SCORE_MAPS


class Reasons:
    """Writes and finds the reasons of queries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture(self, query_id: int) -> Path:
        """File of a query's picture; it may not be there yet."""
        return self.folder / f"{query_id}.png"

    def has_picture(self, query_id: int) -> bool:
        """Whether a query has a picture."""
        return self.picture(query_id).is_file()

    def get(self, query_id: int) -> dict[str, Any]:
        """The reason of a query; empty when none was kept."""
        return read_json(self.folder / f"{query_id}.json") or {}

    def keep(self, queries: Sequence[Query], pictures: Sequence[RGB]) -> None:
        """Stores each query's reason and picture."""
        for query, rgb in zip(queries, pictures, strict=True):
            write_json(self.folder / f"{query.id}.json", query.to_json())
            write_atomic(self.picture(query.id), partial(_save, rgb))


def draw(
    method: QueryMethod, regions: Sequence[Region], datastore: PartialLabelDatastore, evidence: object
) -> list[RGB]:
    """A picture of each region, in their order; every image and score map is read once.

    Raises:
        ImageError: an image that cannot be read, so that nobody is asked to annotate it.
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


def _score_map(method: QueryMethod, evidence: object, image: str) -> NDArray[np.floating] | None:
    if method.uncertainty not in SCORE_MAPS or not isinstance(evidence, ModelEvidence):
        return None
    return SCORE_MAPS[method.uncertainty](evidence.moments(image))
