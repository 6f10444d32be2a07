# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Frames around regions as a label map, and their check in submissions. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lib.partial_labels import LabelError, LabelMap
from lib.regions import Region

FRAME_SEGMENT = "query_region"


def frames(regions: Sequence[Region], shape: Sequence[int]) -> LabelMap:
    """Label map with the frames of `regions` as 1.

    No frame enters another region: of two regions side by side the common face stays free, and both share one frame
    around them.
    """
    mask = np.zeros(tuple(shape), dtype=bool)
    for region in regions:
        mask |= region.frame(shape)
    for region in regions:
        mask[region.slices] &= region.frame(shape)[region.slices]
    return mask.astype(np.uint8)


def check_frame_segment(
    label_xyz: LabelMap,
    label_info: Iterable[Mapping[str, Any]] | None,
    answered: Sequence[Region],
    asked: Sequence[Region],
) -> None:
    """Refuse voxels that were painted into the frame's segment by mistake.

    Clients export the frame too, and its voxels are read as background. If `answered` regions contain voxels of it
    outside of the frames of the regions `asked`, the annotator drew with the wrong segment.

    Raises:
        LabelError: with the number of these voxels.
    """
    values = [int(entry["idx"]) for entry in label_info or () if str(entry["name"]).lower() == FRAME_SEGMENT]
    if not any(values):
        return
    painted = np.zeros(label_xyz.shape, dtype=bool)
    for region in answered:
        painted[region.slices] = np.isin(label_xyz[region.slices], [value for value in values if value])
    if not painted.any():
        return
    for region in asked:
        painted &= ~region.frame(label_xyz.shape)
    count = int(np.count_nonzero(painted))
    if count:
        raise LabelError(
            f"{count} voxels inside of the region are painted into the segment {FRAME_SEGMENT}, which only shows where "
            "to work: move them to the segment of their class, or erase them, and submit again"
        )
