# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A series of single-frame DICOM images as one volume on its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lib.regions import Triple
from lib.storage.volume_headers import ImageError

# RAS millimetres (NIfTI) to LPS millimetres (DICOM) and back.
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
# Orientation cosines that differ by less are the same; decimal strings and scanners round.
_SAME_TURN = 1e-3
# Sine of the angle between the stack and the normal of its slices from which a gantry counts as tilted.
_TILT = 2e-3
# Largest deviation of a slice from its position, as a share of the distance between slices.
_UNEVEN = 0.02


@dataclass(frozen=True)
class SeriesGrid:
    """Grid of a series.

    Axis x runs along the columns of a slice, y along its rows, z over the slices in the direction of the cross product
    of both: `affine` maps voxels in this order to millimetres in RAS. `order` lists the slices along z, as indices into
    the given sequence; `falling` is whether all their instance numbers fall along z.
    """

    order: tuple[int, ...]
    shape: Triple
    affine: NDArray[np.float64]
    falling: bool


def series_grid(headers: Sequence[Dataset]) -> SeriesGrid:
    """The grid of a series from the headers of its instances, in any order.

    Raises:
        ImageError: the series is not a volume (one slice, several frames per file, colour, no positions), or its grid
            is not regular (mixed sizes or orientations, missing or doubled slices, a tilted gantry).
    """
    name = _name(headers)
    for header in headers:
        _check_slice(header, name)
    if len(headers) < 2:
        raise ImageError(f"{name} holds one slice, which is not a volume; leave it out by the search filter")
    sizes = {(int(h.Columns), int(h.Rows), *(round(float(v), 5) for v in h.PixelSpacing)) for h in headers}
    turns = np.array([[float(v) for v in h.ImageOrientationPatient] for h in headers])
    if len(sizes) > 1 or np.ptp(turns, axis=0).max() > _SAME_TURN:
        raise ImageError(f"{name} mixes slices of several sizes, spacings or orientations; split it into series")
    row, column = turns[0, :3], turns[0, 3:]
    normal = np.cross(row, column)
    places = np.array([[float(v) for v in h.ImagePositionPatient] for h in headers])
    order = np.argsort(places @ normal, kind="stable")
    step = _step(places[order], normal, name)
    down, across = (float(v) for v in headers[0].PixelSpacing)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([row * across, column * down, step], axis=1)
    lps[:3, 3] = places[order[0]]
    shape = int(headers[0].Columns), int(headers[0].Rows), len(headers)
    numbers = [int(headers[i].get("InstanceNumber", None) or 0) for i in order]
    falling = all(first > second for first, second in pairwise(numbers))
    return SeriesGrid(tuple(int(i) for i in order), shape, FLIP @ lps, falling)


def read_series(files: Sequence[Path]) -> tuple[NDArray[Any], SeriesGrid]:
    """Values (X, Y, Z) of a series, rescaled by its headers, and their grid.

    Raises:
        ImageError: as `series_grid`, or pixels that cannot be decoded.
    """
    import SimpleITK

    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    grid = series_grid(headers)
    slices = []
    for place in grid.order:
        try:
            # One slice at a time, since each has its own slope and intercept.
            slices.append(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(files[place]), imageIO="GDCMImageIO"))[0])
        except RuntimeError as error:
            raise ImageError(
                f"{_name(headers)}: the pixels of instance {headers[place].get('SOPInstanceUID', '?')} cannot be "
                f"decoded ({str(error).strip().splitlines()[-1]}); store it uncompressed"
            ) from error
    return _narrow(np.stack(slices).transpose(2, 1, 0)), grid


def _check_slice(header: Dataset, name: str) -> None:
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise ImageError(f"{name} holds colour images; leave it out by the search filter")
    if int(header.get("NumberOfFrames", None) or 1) > 1:
        raise ImageError(f"{name} holds several frames a file (enhanced DICOM); store it with one frame a file")
    needed = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")
    missing = [keyword for keyword in needed if header.get(keyword) is None]
    if missing:
        raise ImageError(f"{name} lacks {', '.join(missing)}, so its place is unknown; leave it out")


def _step(places: NDArray[np.float64], normal: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """From one slice to the next, in millimetres; `places` are in the order of the slices."""
    gaps = np.diff(places @ normal)
    step: NDArray[np.float64] = (places[-1] - places[0]) / (len(places) - 1)
    distance = float(np.linalg.norm(step))
    if gaps.min() <= 1e-3:
        kinds = len(np.unique(np.round(places @ normal, 2)))
        raise ImageError(
            f"{name} has {len(places)} slices at {kinds} positions (phases or echoes in one series); split it"
        )
    # A common shift of all slices is a tilt; a single displaced slice is a gap.
    lean = float(np.linalg.norm(step - (step @ normal) * normal)) / distance
    if lean > _TILT:
        angle = float(np.degrees(np.arcsin(min(lean, 1.0))))
        raise ImageError(f"{name} was taken with a gantry tilted by {angle:.1f} degrees; resample it and store that")
    off = float(np.abs(np.diff(places, axis=0) - step).max())
    if off > _UNEVEN * distance:
        raise ImageError(
            f"{name} has slices {gaps.min():.2f} to {gaps.max():.2f} mm apart; complete it, or resample it evenly"
        )
    return step


def _narrow(values_xyz: NDArray[Any]) -> NDArray[Any]:
    """int16 or int32 where all values are whole and fit, float32 otherwise."""
    if np.array_equal(values_xyz, np.round(values_xyz)):
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= values_xyz.min() and values_xyz.max() <= np.iinfo(kind).max:
                return values_xyz.astype(kind)
    return values_xyz.astype(np.float32)


def _name(headers: Sequence[Dataset]) -> str:
    if not headers:
        raise ImageError("a series without instances is not a volume; store it again")
    return f"series {headers[0].get('SeriesInstanceUID', '?')}"
