# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Greedy selection of the best boxes that overlap neither each other nor what is taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.regions import Box, Triple, triple

ScoredBox = tuple[Triple, float]


def forbid(grid: NDArray[np.floating[Any]], size: Sequence[int], stride: Sequence[int], boxes: Iterable[Box]) -> None:
    """Set to -inf, in place, every position of `grid` whose box of `size` shares a voxel with one of `boxes`.

    Position i starts at voxel i * stride; it meets (t, d) where t - size < i * stride < t + d on every axis.
    """
    for start, extent in boxes:
        cut = []
        for t, d, k, s, n in zip(start, extent, size, stride, grid.shape, strict=True):
            low = max(0, -((k - 1 - t) // s))  # ceil((t - k + 1) / s)
            cut.append(slice(low, min(n, (t + d - 1) // s + 1)))
        grid[tuple(cut)] = -np.inf


def open_grid(
    grid: NDArray[np.floating[Any]], size: Sequence[int], stride: Sequence[int], taken: Iterable[Box]
) -> NDArray[np.floating[Any]]:
    """Copy of `grid` in which only free positions are above -inf.

    A score of -inf (the logarithm of nothing) stays choosable, last; NaN never is.
    """
    work = np.array(grid)
    if not np.isfinite(work.min(initial=0)):
        np.maximum(work, np.finfo(work.dtype).min, out=work)  # keeps NaN
        np.fmax(work, -np.inf, out=work)  # drops NaN
    forbid(work, size, stride, taken)
    return work


class BoxQueue:
    """Best free boxes of one image, one at a time, each found only when asked for.

    Every call of `pop` is one masked argmax; ties go to the lowest flat index (C order) of the grid.
    """

    def __init__(
        self, grid: NDArray[np.floating[Any]], size: Sequence[int], stride: Sequence[int], taken: Iterable[Box]
    ) -> None:
        self._grid = grid
        self._size, self._stride = triple(size), triple(stride, "stride")
        self._work = open_grid(grid, self._size, self._stride, taken)

    def pop(self) -> ScoredBox | None:
        """(start, score) of the best free box, which is thereby taken; None when no box is free."""
        if self._work.size == 0:
            return None
        flat = int(self._work.argmax())
        if self._work.flat[flat] == -np.inf:
            return None
        position = np.unravel_index(flat, self._work.shape)
        start = triple(int(i) * s for i, s in zip(position, self._stride, strict=True))
        forbid(self._work, self._size, self._stride, [(start, self._size)])
        return start, float(self._grid[position])

    def block(self, boxes: Iterable[Box]) -> None:
        """Remove `boxes` from the free positions."""
        forbid(self._work, self._size, self._stride, boxes)


def best_boxes(
    grid: NDArray[np.floating[Any]],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1, 1),
    taken: Iterable[Box] = (),
    limit: int | None = None,
    floor: float | None = None,
) -> list[ScoredBox]:
    """Best boxes of `size`, best first, none overlapping another or a `taken` (start, size); touching is allowed.

    `grid` (GX, GY, GZ) holds one score per position, position i starting at voxel i * stride (nnActive, section 4).
    Ties go to the lowest flat index; NaN is never chosen; -inf is chosen last. Stops after `limit` boxes, or at the
    first one that does not exceed `floor`.
    """
    queue, found = BoxQueue(grid, size, stride, taken), list[ScoredBox]()
    while limit is None or len(found) < limit:
        best = queue.pop()
        if best is None or (floor is not None and best[1] <= floor):
            break
        found.append(best)
    return found
