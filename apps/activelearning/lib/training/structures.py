# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Structures of a class in the annotations: the smallest one, and classes that are one piece in nearly all images."""

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


# A class counts as one piece if this many images show it, with this share of its voxels outside of the largest
# component on average and at most. Annotators leave single voxels behind, and two touching organs part in some images.
ENOUGH, MEAN_OUTSIDE, MOST_OUTSIDE = 5, 0.01, 0.1


class OnePiece:
    """Classes that are one component in nearly all annotated images; labels are added one at a time.

    With s the share of a class's voxels outside of its largest component (26 neighbours), a class is one piece if five
    or more images hold it, mean(s) <= 0.01 and max(s) <= 0.1. Value 0 stands for all foreground taken together. Only
    fully annotated images count: elsewhere a second component could lie in the unlabelled part. With partial labels
    alone no class is found.

    Source: Isensee et al. 2021, online methods (post-processing by the largest component), with a rule that reads the
    annotations where nnU-Net compares Dice of a cross-validation.
    """

    def __init__(self, classes: Mapping[str, int]) -> None:
        self.values = (0, *sorted(classes.values()))
        self._outside: dict[int, list[float]] = {value: [] for value in self.values}

    def add(self, label_xyz: LabelMap) -> None:
        """Add the label map (X, Y, Z) of one image."""
        if (label_xyz == UNLABELLED).any():
            return
        boxes = ndimage.find_objects(label_xyz.astype(np.uint8))
        everything = ndimage.find_objects((label_xyz > 0).view(np.uint8))
        for value in self.values:
            box = everything[0] if everything and value == 0 else boxes[value - 1] if 0 < value <= len(boxes) else None
            if box is not None:
                inside = label_xyz[box]
                self._outside[value].append(_outside_largest(inside == value if value else inside > 0))

    def found(self) -> tuple[int, ...]:
        """Values of the classes that are one piece, 0 for all foreground together."""
        return tuple(
            value
            for value, shares in self._outside.items()
            if len(shares) >= ENOUGH and float(np.mean(shares)) <= MEAN_OUTSIDE and max(shares) <= MOST_OUTSIDE
        )


def _outside_largest(mask_xyz: NDArray[np.bool_]) -> float:
    """Share of the voxels of a mask outside of its largest component."""
    parts_xyz, count = ndimage.label(mask_xyz, NEIGHBOURS)
    voxels = np.bincount(parts_xyz.ravel(), minlength=count + 1)[1:]
    return float(1 - voxels.max() / voxels.sum())


def _smallest_whole(label_xyz: LabelMap, box: tuple[slice, ...], value: int) -> int:
    """Voxels of the smallest component of `value` in `box` that touches no unlabelled voxel; 0 where there is none."""
    around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    near_xyz: NDArray[np.uint8] = label_xyz[around]
    parts_xyz, count = ndimage.label(near_xyz == value, NEIGHBOURS)
    voxels = np.bincount(parts_xyz.ravel(), minlength=count + 1)
    open_xyz = ndimage.binary_dilation(near_xyz == UNLABELLED, NEIGHBOURS)
    whole = np.setdiff1d(np.arange(1, count + 1), parts_xyz[open_xyz])
    return int(voxels[whole].min()) if whole.size else 0
