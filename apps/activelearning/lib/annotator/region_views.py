# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A region with its surroundings, upright for a viewer, and the way back to the stored voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from lib.regions import Box, Triple, triple

_Array = TypeVar("_Array", bound=np.generic)

# Voxels around a region on each side, at least: enough to see where it lies.
MARGIN = 16
# Voxels of a view at most; the margin gives way, the region never does.
MOST_VOXELS = 6_000_000


@dataclass(frozen=True)
class RegionView:
    """Crop of an image around a region, with its axes turned to right, anterior, superior.

    Axes are only flipped and permuted, so that every voxel of the view is one of the image.

    Args:
        box: start and size of the region in the stored voxels.
        crop: start and size of the view in the stored voxels.
        affine: of the stored image, voxel -> RAS mm.
    """

    box: Box
    crop: Box
    affine: NDArray[np.float64]

    @property
    def _turn(self) -> NDArray[np.float64]:
        return cast("NDArray[np.float64]", orientations.io_orientation(self.affine))

    @property
    def shape(self) -> Triple:
        """Voxels of the view along right, anterior and superior."""
        return self._turned(self.crop[1])

    @property
    def region(self) -> Box:
        """Start and size of the region in the view."""
        size = self._turned(self.box[1])
        found = [0, 0, 0]
        for stored, (axis, sign) in enumerate(self._turn):
            before = self.box[0][stored] - self.crop[0][stored]
            after = self.crop[1][stored] - before - self.box[1][stored]
            found[int(axis)] = before if sign > 0 else after
        return triple(found, "start"), size

    @property
    def upright_affine(self) -> NDArray[np.float64]:
        """Voxel of the view -> RAS mm of the image."""
        moved = self.affine.copy()
        moved[:3, 3] = self.affine[:3, :3] @ np.array(self.crop[0]) + self.affine[:3, 3]
        return cast("NDArray[np.float64]", moved @ orientations.inv_ornt_aff(self._turn, self.crop[1]))

    def upright(self, stored_xyz: NDArray[_Array]) -> NDArray[_Array]:
        """Turn the voxels of the crop, or of the region, into the axes of the view."""
        turned = orientations.apply_orientation(stored_xyz, self._turn)
        return cast("NDArray[_Array]", np.ascontiguousarray(turned))

    def stored(self, upright_xyz: NDArray[_Array]) -> NDArray[_Array]:
        """Turn voxels in the axes of the view back into those of the stored image; the inverse of `upright`."""
        there = orientations.axcodes2ornt(("R", "A", "S"))
        back = orientations.ornt_transform(there, self._turn)
        return cast("NDArray[_Array]", np.ascontiguousarray(orientations.apply_orientation(upright_xyz, back)))

    def nifti(self, upright_xyz: NDArray[Any]) -> bytes:
        """The voxels of the view as an uncompressed NIfTI file."""
        image = nib.Nifti1Image(upright_xyz, self.upright_affine)
        image.header.set_xyzt_units("mm")
        return image.to_bytes()

    def _turned(self, stored: Sequence[int]) -> Triple:
        found = [0, 0, 0]
        for value, (axis, _) in zip(stored, self._turn, strict=True):
            found[int(axis)] = value
        return triple(found)


def view_of(box: Box, shape: Triple, affine: NDArray[np.float64], most: int = MOST_VOXELS) -> RegionView:
    """View of a region `box` in an image of `shape`: half of its size, and 16 voxels at least, on every side.

    The margin shrinks until the view has at most `most` voxels; of the region nothing is left out.
    """
    for share in (*(0.8**k for k in range(18)), 0.0):
        margin = [math.ceil(share * max(MARGIN, d / 2)) for d in box[1]]
        low = [max(0, a - m) for a, m in zip(box[0], margin, strict=True)]
        high = [min(n, a + d + m) for a, d, m, n in zip(*box, margin, shape, strict=True)]
        size = [b - a for a, b in zip(low, high, strict=True)]
        if math.prod(size) <= most:
            break
    return RegionView(box, (triple(low, "start"), triple(size)), np.asarray(affine, dtype=np.float64))
