# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Region: a box of voxels in one stored image; geometry only, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
Box = tuple[Triple, Triple]  # (start, size), both in voxels


def triple(values: Iterable[int], what: str = "size") -> Triple:
    """Three whole numbers as a tuple of Python ints.

    Raises:
        ValueError: not exactly three values, or one of them is not a whole number.
    """
    items = list(values)
    if len(items) != 3 or any(isinstance(v, bool) or int(v) != v for v in items):
        raise ValueError(f"{what} must be three whole numbers of voxels, found {items!r}")
    return cast(Triple, tuple(int(v) for v in items))


@dataclass(frozen=True, order=True)
class Region:
    """A box of voxels in one stored image: lowest corner `start` and `size`, both in voxels of that image.

    Raises:
        ValueError: a size below one or a start below zero.
    """

    image: str
    start: Triple
    size: Triple

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", triple(self.start, "start"))
        object.__setattr__(self, "size", triple(self.size, "size"))
        if min(self.size) < 1 or min(self.start) < 0:
            raise ValueError(f"region of {self.image}: start {self.start} and size {self.size} do not make a box")

    @property
    def stop(self) -> Triple:
        """First corner outside of the box (exclusive end)."""
        return cast(Triple, tuple(a + d for a, d in zip(self.start, self.size, strict=True)))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index that cuts the box out of an array of the image's shape."""
        return cast(
            "tuple[slice, slice, slice]", tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        )

    @property
    def box(self) -> Box:
        """(start, size), the form the selectors take."""
        return self.start, self.size

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.size))

    def inside(self, shape: Sequence[int]) -> bool:
        """Return whether the whole box lies in an image of `shape`."""
        return all(b <= n for b, n in zip(self.stop, shape, strict=True))

    def overlaps(self, other: Region) -> bool:
        """Return whether both share at least one voxel; touching faces do not overlap."""
        return self.image == other.image and boxes_overlap(self.box, other.box)

    def frame(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """One-voxel shell just outside of the box, cut off at the border of an image of `shape`.

        A box that spans the image on two or three axes (a slice, a volume) has no outside there. Its frame lies inside
        the box, along the border of the image: a slice shows a ring and not two filled planes beside it.
        """
        mask = np.zeros(tuple(shape), dtype=bool)
        spans = [a == 0 and b == n for a, b, n in zip(self.start, self.stop, shape, strict=True)]
        if sum(spans) < 2:
            outer = (slice(max(a - 1, 0), b + 1) for a, b in zip(self.start, self.stop, strict=True))
            mask[tuple(outer)] = True
            mask[self.slices] = False
            return mask
        mask[self.slices] = True
        inner = (slice(a + s, b - s) for a, b, s in zip(self.start, self.stop, spans, strict=True))
        mask[tuple(inner)] = False
        return mask


def boxes_overlap(a: Box, b: Box) -> bool:
    """Return whether two (start, size) boxes share a voxel: a0 < b1 and b0 < a1 per axis (nnActive, section 3)."""
    return all(sa < sb + db and sb < sa + da for sa, da, sb, db in zip(a[0], a[1], b[0], b[1], strict=True))


def clip_size(size: Sequence[int], shape: Sequence[int]) -> Triple:
    """Effective size K_i = min(P_i, S_i) of a patch in an image of `shape` (nnActive specification, section 0)."""
    return cast(Triple, tuple(min(int(p), int(s)) for p, s in zip(size, shape, strict=True)))


def centred(voxel: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Box:
    """Box of `size` centred on `voxel` and pushed inside `shape`: start = clip(v - K//2, 0, S - K)."""
    kept = clip_size(size, shape)
    start = tuple(int(min(max(v - k // 2, 0), s - k)) for v, k, s in zip(voxel, kept, shape, strict=True))
    return cast(Triple, start), kept


def millimetres_to_voxels(size_mm: Sequence[float], spacing: Sequence[float]) -> Triple:
    """Size in voxels, at least one on every axis: round(size_mm / spacing); spacing in mm per voxel."""
    return cast(Triple, tuple(max(1, round(m / s)) for m, s in zip(size_mm, spacing, strict=True)))
