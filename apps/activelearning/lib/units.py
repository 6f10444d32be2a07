# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Voxel maps to scored units: patches, slices, whole volumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.regions import Triple, clip_size, triple

Array = NDArray[np.float32]
UNITS = ("patch", "slice", "volume")


def box_mean(score: ArrayLike, size: Sequence[int], stride: Sequence[int] = (1, 1, 1)) -> Array:
    """Mean over every box of `size` that lies wholly inside `score`, one value a position (nnActive, section 4).

    out[i] = (1 / prod K) sum of score over [i s, i s + K), K = min(size, shape); the result has floor((S - K)/s) + 1
    positions an axis, position i starting at voxel i s. Sums are built by doubling their width in float32, so that
    non-negative scores never give a negative mean.

    Shapes: score (X, Y, Z) -> (GX, GY, GZ) float32.

    Raises:
        ValueError: not a 3D score, or a size or stride below one.
    """
    values = np.ascontiguousarray(score, dtype=np.float32)
    if values.ndim != 3:
        raise ValueError(f"a score map has three axes (x, y, z), found the shape {values.shape}")
    wanted, steps = triple(size), triple(stride, "stride")
    if min(wanted) < 1 or min(steps) < 1:
        raise ValueError(f"box size and stride must be one voxel or more, found {wanted} and {steps}")
    kept = clip_size(wanted, values.shape)
    _, ny, nz = values.shape
    grid = [(n - k) // s + 1 for n, k, s in zip(values.shape, kept, steps, strict=True)]
    sums_x = np.ascontiguousarray(_running_sum(values, kept[0], 1)[:: steps[0]])
    # On the flat map a shift along y or z is one contiguous pass; values beyond the end of a row are cut off below.
    sums = _running_sum(_running_sum(sums_x.ravel(), kept[1], nz), kept[2], 1)
    jumps = [sums.itemsize * v for v in (ny * nz, nz * steps[1], steps[2])]
    return np.asarray(np.lib.stride_tricks.as_strided(sums, grid, jumps) * np.float32(1 / np.prod(kept)))


def _running_sum(values: Array, width: int, shift: int) -> Array:
    """out[i] = sum of values[i + j shift], j < width, along the first axis, by binary decomposition of the width."""
    n = values.shape[0] - (width - 1) * shift
    doubled, covered, reach = values, 0, 1
    total: Array | None = None
    while covered + reach < width:
        if width & reach:
            part = doubled[covered * shift :][:n]
            total = part.copy() if total is None else np.add(total, part, out=total)
            covered += reach
        doubled = doubled[: len(doubled) - reach * shift] + doubled[reach * shift :]
        reach *= 2
    last = doubled[covered * shift :][:n]
    return last if total is None else np.add(total, last, out=total)


def slice_mean(score: ArrayLike, axis: int) -> NDArray[np.float64]:
    """Mean of `score` (X, Y, Z) over each plane across `axis` (0, 1 or 2), one value per slice.

    Raises:
        ValueError: an axis other than 0, 1 or 2.
    """
    if axis not in (0, 1, 2):
        raise ValueError(f"a slice lies across axis 0, 1 or 2, found {axis!r}")
    others = tuple(a for a in range(3) if a != axis)
    return np.asarray(np.asarray(score).mean(axis=others, dtype=np.float64))


def volume_mean(score: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean of `score` (X, Y, Z) over the voxels of `mask`, over all of them without a mask or when it is empty."""
    values = np.asarray(score)
    chosen = None if mask is None else np.asarray(mask, dtype=bool)
    if chosen is None or not chosen.any():
        return float(values.mean(dtype=np.float64))
    return float(values[chosen].mean(dtype=np.float64))


def covering_starts(length: int, size: int) -> tuple[int, ...]:
    """Starts of the fewest intervals of `size` voxels that cover an axis of `length`, evenly spread.

        start_i = round(i (n - k) / (m - 1)), i < m = ceil(n / k)

    The first starts at 0 and the last ends with the axis. They overlap where k does not divide n.
    """
    count = -(-length // size)
    return tuple(round(i * (length - size) / max(1, count - 1)) for i in range(count))


def covering_means(score: ArrayLike, size: Sequence[int]) -> Array:
    """Mean of `score` (X, Y, Z) over each of the boxes of `size` that cover it, at the `covering_starts` of every axis.

    Shapes: (X, Y, Z) -> (MX, MY, MZ) float32, m = ceil(n / k) along each axis.
    """
    sums = np.asarray(score)
    for axis, width in enumerate(size):
        starts = covering_starts(sums.shape[axis], width)
        # reduceat sums up to the next index, or takes one value where that lies before; every second sum is a box.
        ends = [v for start in starts for v in (start, start + width)][:-1]
        picked = (slice(None),) * axis + (slice(None, None, 2),)
        sums = np.add.reduceat(sums, ends, axis=axis, dtype=np.float64)[picked]
    return np.asarray(sums / np.prod(size), np.float32)


def unit_size(unit: str, shape: Sequence[int], size: Sequence[int] | None = None, axis: int = 2) -> Triple:
    """Voxels a unit spans in an image of `shape`: the clipped patch, a full plane of thickness one, or everything.

    Raises:
        ValueError: an unknown unit, a patch without size, or an axis other than 0, 1 or 2.
    """
    if unit == "volume":
        return triple(shape)
    if unit == "slice":
        if axis not in (0, 1, 2):
            raise ValueError(f"a slice lies across axis 0, 1 or 2, found {axis!r}")
        return triple(1 if a == axis else n for a, n in enumerate(shape))
    if unit == "patch":
        if size is None:
            raise ValueError("the unit patch needs a size in voxels or millimetres, found none")
        return clip_size(triple(size), shape)
    raise ValueError(f"unit must be one of {', '.join(UNITS)}, found {unit!r}")


def unit_grid(score: ArrayLike, size: Sequence[int], stride: Sequence[int] = (1, 1, 1)) -> Array:
    """Mean of `score` (X, Y, Z) over every unit of `size`, as `box_mean`, by the cheapest way for its form."""
    values = np.asarray(score)
    across = [a for a in range(3) if size[a] < values.shape[a]]
    if len(across) == 1 and size[across[0]] == 1:
        grid_shape = tuple(-1 if a == across[0] else 1 for a in range(3))
        return np.asarray(slice_mean(values, across[0])[:: stride[across[0]]].reshape(grid_shape), np.float32)
    return box_mean(values, size, stride)
