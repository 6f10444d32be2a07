# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pseudo labels for the slices between two annotated ones."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from lib.partial_labels import UNLABELLED

KINDS = ("signed_distance", "morphological")
_MORPHOLOGICAL = "itk-morphologicalcontourinterpolation"


def interpolate(top: ArrayLike, bottom: ArrayLike, n: int, kind: str = "signed_distance") -> NDArray[np.generic] | None:
    """Label slices between `top` and `bottom`, from the top, or None where a class does not overlap itself.

    Each class in turn, in the order of its value; a later one overwrites. A class that is in neither slice is ignored;
    one whose two cross-sections share no pixel (or that is in one slice only) leaves the whole block without labels.
    Signed distance: slice i of 1 .. n is [(1 - t) s(top) + t s(bottom) >= 0] with t = i / (n + 1) and s = inside
    distance - outside distance + 0.5 in pixels (Burmeister 2022, appendix A). `kind="morphological"` needs the optional
    package itk-morphologicalcontourinterpolation.

    Shapes: top and bottom (X, Y) labels, 0 background -> (n, X, Y) of their type.

    Raises:
        ValueError: slices that differ in shape, n below zero, an unknown kind, or the optional package is missing.
    """
    first, last = np.asarray(top), np.asarray(bottom)
    if first.shape != last.shape or first.ndim != 2:
        raise ValueError(f"both slices must be planes of one shape, found {first.shape} and {last.shape}")
    if n < 0:
        raise ValueError(f"the number of slices between must be zero or more, found {n}")
    if kind not in KINDS:
        raise ValueError(f"pseudo labels are made by {' or '.join(KINDS)}, found {kind!r}")
    found = np.zeros((n, *first.shape), dtype=np.result_type(first, last))
    for value in np.union1d(np.unique(first), np.unique(last)):
        if value == 0:
            continue
        a, b = first == value, last == value
        if not (a & b).any():
            return None
        found[_between(a, b, n) if kind == "signed_distance" else _morphological(a, b, n)] = value
    return found


def fill_between(
    label_xyz: NDArray[np.uint8], thickness: int, axis: int = 2, kind: str = "signed_distance"
) -> NDArray[np.uint8]:
    """A label map in which unlabelled slices between two annotated ones carry pseudo labels.

    Two wholly annotated slices along `axis` that are neighbours in the map and at most `thickness - 1` apart are the
    outer slices of a block; only voxels without annotation are filled, and a block without interpolation is unchanged.
    The input is not changed.

    Source: Burmeister et al. 2022, strided sampling (block thickness 5, 10 or 15).
    """
    filled = label_xyz.copy()
    planes = np.moveaxis(filled, axis, 0)
    annotated = np.flatnonzero(~(planes == UNLABELLED).any(axis=(1, 2)))
    for a, b in itertools.pairwise(annotated.tolist()):
        if not 2 <= b - a <= thickness - 1:
            continue
        between = interpolate(planes[a], planes[b], b - a - 1, kind)
        if between is not None:
            planes[a + 1 : b] = np.where(planes[a + 1 : b] == UNLABELLED, between, planes[a + 1 : b])
    return filled


def signed_distance(mask: ArrayLike) -> NDArray[np.float64]:
    """Distance to the background inside, minus distance to the mask outside, plus 0.5; in pixels, same shape."""
    inside = np.asarray(mask, dtype=bool)
    if inside.all():
        # Without any background SciPy measures from a corner; the nearest background is taken beside the plane.
        return np.asarray(ndimage.distance_transform_edt(np.pad(inside, 1))[(slice(1, -1),) * inside.ndim] + 0.5)
    return np.asarray(ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside) + 0.5)


def _between(a: NDArray[np.bool_], b: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    t = (np.arange(1, n + 1) / (n + 1))[:, None, None]
    return np.asarray((1 - t) * signed_distance(a) + t * signed_distance(b) >= 0)


def _morphological(a: NDArray[np.bool_], b: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    if importlib.util.find_spec("itk.itkMorphologicalContourInterpolatorPython") is None:
        raise ValueError(f"morphological pseudo labels need a package that is missing: pip install {_MORPHOLOGICAL}")
    import itk

    volume = np.zeros((n + 2, *a.shape), np.uint8)
    volume[0], volume[-1] = a, b
    filled = itk.morphological_contour_interpolator(itk.image_from_array(volume))
    return np.asarray(itk.array_from_image(filled)[1:-1] > 0)
