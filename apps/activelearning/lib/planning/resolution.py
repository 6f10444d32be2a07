# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which axis slices lie across, the spacing a network works at, and the kind of network that suits them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from lib.models.plan import Configuration
from lib.planning.fingerprint import Fingerprint
from lib.regions import Triple

Spacing = tuple[float, float, float]

# An axis this many times coarser than the finest, and shorter than the others by the same factor, is anisotropic.
ANISOTROPIC = 3.0
# Fewer thick slices than this make a 3D network see little along them.
FEW_SLICES = 32


def choose_configuration(shapes: Sequence[Triple], spacings: Sequence[Spacing]) -> tuple[Configuration, str]:
    """Kind of network for images of `shapes` (voxels) and `spacings` (mm), and why in a sentence.

    With r the coarsest median spacing over the finest and n the median number of slices across the coarsest axis:
    2d for r >= 3 and n < 32, 3d_anisotropic for r >= 3 and n >= 32, else 3d_fullres.

    Source: Isensee et al. 2021 (on ACDC a 2D U-Net is as good as a 3D one); the limit of 32 slices is ours.
    """
    x, y, z = (float(mm) for mm in np.median(np.array(spacings), axis=0))
    axis = coarse_axis((x, y, z))
    thick = (x, y, z)[axis] / min(x, y, z)
    slices = float(np.median(np.array(shapes)[:, axis]))
    if thick < ANISOTROPIC:
        return "3d_fullres", f"voxels of the median image are {thick:.1f} times as long as wide, which suits 3D crops"
    across = f"slices are {thick:.1f} times as far apart as their voxels, and the median image has {slices:g} of them"
    if slices < FEW_SLICES:
        return "2d", f"{across}: too few to look along, so each slice is segmented by itself"
    return "3d_anisotropic", f"{across}: looked at in-plane first, then along all axes"


def target_spacing(pool: Fingerprint) -> tuple[Spacing, str]:
    """Median spacing; on an axis that is both much coarser and much shorter the 10th percentile instead.

    Where that is finer than the other axes, it is theirs.

    Source: Isensee et al. 2021, online methods, "Image target spacing".
    """
    median = pool.median_spacing()
    sizes = sorted((shape for shape in pool.shapes), key=math.prod)
    shape = [sorted(s[a] for s in sizes)[len(sizes) // 2] for a in range(3)]
    axis = coarse_axis(median)
    others = [a for a in range(3) if a != axis]
    if not (
        median[axis] > ANISOTROPIC * min(median[a] for a in others)
        and shape[axis] * ANISOTROPIC < min(shape[a] for a in others)
    ):
        return median, "median of the pool"
    fine = max(max(median[a] for a in others), pool.percentile_spacing(axis, 10))
    wanted = cast(Spacing, tuple(fine if a == axis else median[a] for a in range(3)))
    return wanted, f"median of the pool; on axis {axis}, coarse and short, its 10th percentile, not finer than in-plane"


def coarse_axis(spacing: Sequence[float]) -> int:
    """Axis that slices lie across: the one of the largest spacing, the last of equals."""
    return max(range(3), key=lambda a: (round(spacing[a] / min(spacing), 1), a))


def coarser(spacing: Spacing, times: float) -> Spacing:
    """Spacing at which no axis is finer than `times` the finest one: max(s_a, times * min s)."""
    finest = min(spacing)
    return cast(Spacing, tuple(max(mm, times * finest) for mm in spacing))
