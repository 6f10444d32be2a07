# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Regions as 3D Slicer's markups: real boxes in millimetres instead of a label map. Geometry only, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.regions import Region
from lib.storage.volume_headers import ImageError

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
# From nibabel's RAS+ millimetres to the LPS+ ones of the format.
_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_ORTHOGONAL = 1e-3
_YELLOW = [1.0, 0.85, 0.1]


def roi_document(regions: Sequence[Region], labels: Sequence[str], affine: NDArray[np.float64]) -> dict[str, Any]:
    """A `.mrk.json` document with a locked ROI box for each region.

    Args:
        labels: one text for each region; its name and the label of its centre.
        affine: 4 x 4, from voxels to millimetres in RAS.

    Raises:
        ImageError: the axes of the image are sheared, so that no region of it is a box.

    Source: the markups schema 1.0.3 of 3D Slicer.
    """
    boxes = [_roi(region, label, affine) for region, label in zip(regions, labels, strict=True)]
    return {"@schema": SCHEMA, "markups": boxes}


def box_in_mm(
    region: Region, affine: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Centre and size in mm, and the 3 x 3 orientation with the axes of the box as columns, all in LPS.

    A voxel extends by half a voxel from its centre: the centre of `d` voxels from `a` is at a + (d - 1) / 2. The
    orientation is a rotation; if the voxel axes are left-handed, the last one is reversed, which does not change the
    box.

    Raises:
        ImageError: the axes of the image are sheared.
    """
    lps = _TO_LPS @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    axes = lps[:, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > _ORTHOGONAL:
        raise ImageError(
            f"{region.image}: the axes of the image are not at right angles, so its regions are not boxes; "
            "ask for the frame as a segment instead"
        )
    middle = np.array(region.start) + (np.array(region.size) - 1) / 2
    if np.linalg.det(axes) < 0:
        axes[:, 2] *= -1
    return lps[:, :3] @ middle + lps[:, 3], np.array(region.size) * spacing, axes


def _roi(region: Region, label: str, affine: NDArray[np.float64]) -> dict[str, Any]:
    centre, size, axes = box_in_mm(region, affine)
    return {
        "type": "ROI",
        "name": label,
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": True,
        "fixedNumberOfControlPoints": True,
        "labelFormat": "%N",
        "roiType": "Box",
        "center": centre.tolist(),
        "orientation": axes.ravel().tolist(),
        "size": size.tolist(),
        "insideOut": False,
        "controlPoints": [
            {
                "id": "1",
                "label": label,
                "description": label,
                "position": centre.tolist(),
                "orientation": axes.ravel().tolist(),
                "selected": True,
                "locked": True,
                "visibility": True,
                "positionStatus": "defined",
            }
        ],
        "display": {
            "visibility": True,
            "color": _YELLOW,
            "selectedColor": _YELLOW,
            "propertiesLabelVisibility": False,
            "pointLabelsVisibility": True,
            "handlesInteractive": False,
        },
    }
