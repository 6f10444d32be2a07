# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which axis slices lie across, and the spacing a network works at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from lib.planning.fingerprint import Fingerprint

Spacing = tuple[float, float, float]

# An axis this many times coarser than the finest, and shorter than the others by the same factor, is anisotropic.
ANISOTROPIC = 3.0


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
