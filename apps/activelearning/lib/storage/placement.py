# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Place of a label map on the grid of its image: flipped or permuted axes, a part of it, or more than it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lib.regions import Triple

AFFINE_TOLERANCE_MM = 1e-3


class Placement(NamedTuple):
    """Position of a label in its image. All fields are per axis of the image.

    Args:
        axes: parallel axis of the label.
        flipped: whether that axis has the opposite direction.
        start: first voxel of the label, possibly outside of the image.
        size: extent of the label in voxels.
    """

    axes: Triple
    flipped: tuple[bool, bool, bool]
    start: Triple
    size: Triple

    def covers(self, shape: Triple) -> bool:
        """Return whether the label has exactly the voxels of an image of this shape."""
        return self.start == (0, 0, 0) and self.size == shape

    def is_plain(self, shape: Triple) -> bool:
        """Return whether the arrays of label and image are indexed alike."""
        return self.covers(shape) and self.axes == (0, 1, 2) and not any(self.flipped)

    def put(self, label_xyz: NDArray[np.uint8], shape: Triple) -> tuple[NDArray[np.uint8], int]:
        """Label map in the axes of the image, 0 where the file has no voxels, and the number of voxels lost outside."""
        turned = label_xyz.transpose(self.axes)[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]
        here, there = [], []
        for start, size, voxels in zip(self.start, self.size, shape, strict=True):
            first, last = max(start, 0), min(start + size, voxels)
            here.append(slice(first, max(first, last)))
            there.append(slice(first - start, max(first, last) - start))
        placed = np.zeros(shape, np.uint8, order="F")
        placed[tuple(here)] = turned[tuple(there)]
        return placed, int(np.count_nonzero(turned) - np.count_nonzero(placed))


def place(
    label_affines: Iterable[NDArray[np.float64]],
    label_shape: Triple,
    image_affines: Iterable[NDArray[np.float64]],
) -> Placement | None:
    """Place of a label whose voxels coincide with voxels of the image by one of the affines of each; else None.

    With A and B the affines of image and label, B = A [P t; 0 1] must hold with a signed permutation P and whole t.
    """
    label_affines = list(label_affines)
    for image_affine in image_affines:
        for label_affine in label_affines:
            found = _place(label_affine, label_shape, image_affine)
            if found is not None:
                return found
    return None


def _place(label: NDArray[np.float64], shape: Triple, image: NDArray[np.float64]) -> Placement | None:
    exact = np.linalg.solve(image, label)
    if not np.all(np.isfinite(exact)) or np.abs(exact).max() > np.iinfo(np.int32).max:
        return None
    whole = np.round(exact)
    signs = whole[:3, :3]
    if not np.array_equal(np.abs(signs).sum(axis=0), np.ones(3)) or abs(round(float(np.linalg.det(signs)))) != 1:
        return None
    if not np.allclose(image @ whole, label, atol=AFFINE_TOLERANCE_MM):
        return None
    axes = [int(np.flatnonzero(row)[0]) for row in signs]
    flipped = [bool(row[axis] < 0) for row, axis in zip(signs, axes, strict=True)]
    size = [shape[axis] for axis in axes]
    start = [int(t) - (n - 1 if flip else 0) for t, n, flip in zip(whole[:3, 3], size, flipped, strict=True)]
    return Placement(_three(axes), (flipped[0], flipped[1], flipped[2]), _three(start), _three(size))


def _three(values: list[int]) -> Triple:
    return values[0], values[1], values[2]
