# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Smallest sizes, in the annotations, of structures that not every image holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lib.partial_labels import UNLABELLED, LabelMap
from lib.prediction.postprocessing import NEIGHBOURS


class SmallestStructures:
    """Smallest structure of every class that is absent from some image; labels are added one at a time.

    A class is optional if it is absent from a fully annotated image, such as a lesion or a removed organ. A rule
    against false positives helps such classes, but harms those that every image contains. A structure is a component
    (26 neighbours) of a class that no unlabelled voxel touches, so its extent is fully annotated.

    Args:
        classes: name -> value in label maps.
    """

    def __init__(self, classes: Mapping[str, int]) -> None:
        self.classes = dict(classes)
        self._lacking: set[str] = set()
        self._smallest_mm3: dict[str, float] = {}

    def add(self, label_xyz: LabelMap, spacing: Sequence[float]) -> None:
        """Add the label map (X, Y, Z) of one image with voxels of `spacing` mm."""
        boxes = ndimage.find_objects(np.where(label_xyz == UNLABELLED, 0, label_xyz).astype(np.uint8))
        whole = not (label_xyz == UNLABELLED).any()
        for name, value in self.classes.items():
            box = boxes[value - 1] if value <= len(boxes) else None
            if box is None:
                if whole:
                    self._lacking.add(name)
                continue
            voxels = _smallest_whole(label_xyz, box, value)
            if voxels:
                mm3 = voxels * float(np.prod(spacing))
                self._smallest_mm3[name] = min(mm3, self._smallest_mm3.get(name, mm3))

    def found_mm3(self) -> dict[str, float]:
        """Volume in mm^3 of the smallest structure of every optional class that has one."""
        return {name: mm3 for name, mm3 in sorted(self._smallest_mm3.items()) if name in self._lacking}


def _smallest_whole(label_xyz: LabelMap, box: tuple[slice, ...], value: int) -> int:
    """Voxels of the smallest component of `value` in `box` that touches no unlabelled voxel; 0 where there is none."""
    around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    near_xyz: NDArray[np.uint8] = label_xyz[around]
    parts_xyz, count = ndimage.label(near_xyz == value, NEIGHBOURS)
    voxels = np.bincount(parts_xyz.ravel(), minlength=count + 1)
    open_xyz = ndimage.binary_dilation(near_xyz == UNLABELLED, NEIGHBOURS)
    whole = np.setdiff1d(np.arange(1, count + 1), parts_xyz[open_xyz])
    return int(voxels[whole].min()) if whole.size else 0
