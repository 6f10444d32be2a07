# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Annotation cost: models that map one annotated region to a number, all additive over regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COSTS = ("regions", "voxels", "foreground_voxels", "foreground_slices", "border_mm", "minutes")
TITLES = {
    "regions": "annotated regions",
    "voxels": "annotated voxels",
    "foreground_voxels": "annotated foreground voxels",
    "foreground_slices": "annotated slices with foreground",
    "border_mm": "drawn border in mm",
    "minutes": "minutes of annotation",
}
# Minutes = region + slice * slices with foreground + mm * border: an assumption that a study can replace, and that
# recorded times replace where there are any.
MINUTES = {"region": 0.25, "slice": 0.1, "mm": 0.003}
# A whole volume is annotated slice after slice with help of neighbours: a third of the effort (Chlebus et al. 2022).
_WHOLE_VOLUME = 1 / 3


def region_costs(
    label_xyz: NDArray[np.integer[Any]],
    spacing: Sequence[float],
    *,
    unit: str = "patch",
    axis: int = 2,
    minutes: Mapping[str, float] = MINUTES,
) -> dict[str, float]:
    """Every cost of `COSTS` for the true labels `label_xyz` (X, Y, Z) inside one region; spacing in mm.

    Slices lie along `axis`; for unit `slice` along the axis on which the region is one voxel thick. `minutes` holds
    the factors of the linear model minutes = region + slice * foreground_slices + mm * border_mm.
    """
    if unit == "slice" and 1 in label_xyz.shape:
        axis = label_xyz.shape.index(1)
    slices = foreground_slices(label_xyz, axis=axis, whole=unit == "volume")
    border = border_length(label_xyz, spacing, axis=axis)
    return {
        "regions": 1.0,
        "voxels": float(label_xyz.size),
        "foreground_voxels": float(np.count_nonzero(label_xyz)),
        "foreground_slices": slices,
        "border_mm": border,
        "minutes": minutes["region"] + minutes["slice"] * slices + minutes["mm"] * border,
    }


def foreground_slices(label_xyz: NDArray[np.integer[Any]], *, axis: int = 2, whole: bool = False) -> float:
    """Slices along `axis` with a foreground voxel; a `whole` volume counts a third of them (Chlebus et al. 2022)."""
    others = tuple(a for a in range(3) if a != axis)
    found = int(np.count_nonzero((label_xyz > 0).any(axis=others)))
    return found * _WHOLE_VOLUME if whole else float(found)


def border_length(label_xyz: NDArray[np.integer[Any]], spacing: Sequence[float], *, axis: int = 2) -> float:
    """Length in mm of all lines between voxels of different classes, drawn in the slices along `axis`.

    A change between voxels along one in-plane axis is a line with the length of a voxel along the other; the faces of
    the region do not count.
    """
    first, second = (a for a in range(3) if a != axis)
    changes = {a: int(np.count_nonzero(np.diff(label_xyz.astype(np.int16), axis=a))) for a in (first, second)}
    return float(changes[first] * spacing[second] + changes[second] * spacing[first])
