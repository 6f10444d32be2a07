# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One-line captions of regions, with place and reason in radiological terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from lib.ledger.queries import QueryLedger
from lib.ledger.records import SECOND, Query
from lib.querying.methods import DISAGREEMENT
from lib.regions import Region, Triple

# World axis (right-left, posterior-anterior, inferior-superior) -> the plane that lies across it.
PLANES = ("sagittal", "coronal", "axial")
# Least share of a region for a class to be mentioned.
_SLIVER = 0.02


def cue(
    query: Query, place: int, total: int, shape: Triple, affine: NDArray[np.float64], best_score: float | None
) -> str:
    """Caption such as `case_07: axial 34-53, region 3 of 20, high disagreement at the anterior/posterior border`.

    Slices are numbered from 0 along the stored axis, as in viewers of voxel coordinates. The score is described in
    thirds of the best one of its batch, `best_score`.

    Args:
        place: position of the region in its batch, from 1.
        total: regions in the batch.
        shape: shape of the image.
        affine: 4 x 4, from voxels to millimetres in RAS.
    """
    parts = [position(query.region, shape, affine), f"region {place} of {total}", why(query, best_score)]
    return f"{query.region.image}: " + ", ".join(part for part in parts if part)


def cue_in_batch(query: Query, ledger: QueryLedger, shape: Triple, affine: NDArray[np.float64]) -> str:
    """The cue of a recorded region: its place and the best score are those of its batch."""
    # A single second reading keeps the position of the first one.
    batch = ledger.batch(query.batch.removesuffix(SECOND))
    ids = [other.id for other in batch]
    place = ids.index(query.id if query.id in ids or query.twin is None else query.twin) + 1
    scores = [other.score for other in batch if other.score is not None]
    return cue(query, place, len(batch), shape, affine, max(scores, default=None))


def position(region: Region, shape: Sequence[int], affine: NDArray[np.float64]) -> str:
    """Plane and slices to scroll through: across the axis along which the region is thinnest, axial where equal."""
    if region.size == tuple(shape):
        return "whole volume"
    # Oblique scans: each stored axis belongs to the world axis it runs along most.
    planes = [PLANES[int(world)] for world in nib.orientations.io_orientation(affine)[:, 0]]
    axis = min(range(3), key=lambda a: (region.size[a], -PLANES.index(planes[a])))
    first, last = region.start[axis], region.stop[axis] - 1
    return f"{planes[axis]} {first}" + (f"-{last}" if last > first else "")


def why(query: Query, best_score: float | None) -> str:
    """Reason for the uncertainty in a region; empty for methods without a model."""
    uncertainty = str(query.reason.get("uncertainty") or "")
    if not uncertainty or query.score is None:
        return ""
    share = query.score / best_score if best_score and best_score > 0 else 1.0
    level = "high" if share >= 2 / 3 else "moderate" if share >= 1 / 3 else "low"
    what = "disagreement" if any(name in uncertainty for name in DISAGREEMENT) else "uncertainty"
    return f"{level} {what}{_where(query.reason.get('predicted') or {})}"


def _where(predicted: Mapping[str, Any]) -> str:
    """Border between the classes that fill most of the region; small parts of a class do not count."""
    shares = {name: float(share) for name, share in predicted.items() if float(share) >= _SLIVER}
    names = sorted((name for name in shares if name.lower() != "background"), key=lambda name: -shares[name])
    if len(names) > 1:
        return f" at the {names[0].lower()}/{names[1].lower()} border"
    if names:
        border = len(shares) > 1
        return f" at the border of the {names[0].lower()}" if border else f" inside the {names[0].lower()}"
    return " in the background" if shares else ""
