# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Places of training crops: every crop holds an annotated voxel, uniformly placed inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lib.partial_labels import UNLABELLED
from lib.regions import Triple

# Voxels kept per case and class. More would need memory without a change of the distribution of crops.
REMEMBERED_VOXELS = 1 << 18


def bounds(patch: Sequence[int], shape: Sequence[int]) -> tuple[Triple, Triple]:
    """Lowest and highest start of a crop on each axis.

    Inside the image where the crop fits; where it is larger than the image it is centred and padded, so that both are
    -(patch - shape) // 2.
    """
    low = tuple(-((p - s) // 2) if p > s else 0 for p, s in zip(patch, shape, strict=True))
    high = tuple(a if p > s else s - p for a, p, s in zip(low, patch, shape, strict=True))
    return cast(Triple, low), cast(Triple, high)


def place_uniform(voxel: Sequence[int], patch: Sequence[int], shape: Sequence[int], rng: np.random.Generator) -> Triple:
    """Start of a crop that holds `voxel` at a uniform position.

        start = clip(v - U{0, ..., p - 1}, low, high)

    The published sampler draws the offset from U{1, ..., p}, which puts the voxel just outside of the crop with
    probability 1 - prod(1 - 1/p); here the voxel is always inside.

    Source: nnActive specification, section 7 (region sampling).
    """
    offset = [int(rng.integers(p)) for p in patch]
    return _clip([v - o for v, o in zip(voxel, offset, strict=True)], patch, shape)


def place_centred(voxel: Sequence[int], patch: Sequence[int], shape: Sequence[int]) -> Triple:
    """Start of a crop centred on `voxel`: clip(v - p // 2, low, high) (nnU-Net's foreground oversampling)."""
    return _clip([v - p // 2 for v, p in zip(voxel, patch, strict=True)], patch, shape)


def _clip(start: Sequence[int], patch: Sequence[int], shape: Sequence[int]) -> Triple:
    low, high = bounds(patch, shape)
    return cast(Triple, tuple(min(max(s, a), b) for s, a, b in zip(start, low, high, strict=True)))


@dataclass(frozen=True)
class AnnotatedCase:
    """Annotated voxels of one case as flat indices: all of them, and those of each class present."""

    shape: Triple
    annotated: NDArray[np.int64]
    by_class: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def from_label(
        cls, label_xyz: NDArray[np.uint8], rng: np.random.Generator, classes: int = UNLABELLED - 1
    ) -> AnnotatedCase:
        """Indices out of a label map with UNLABELLED voxels; long lists are thinned at random.

        Values above `classes` are sets of classes (see `lib.training.loss`): annotated, but no class.
        """
        flat = label_xyz.ravel()
        present = [c for c in np.unique(flat).tolist() if 0 < c <= classes]
        return cls(
            shape=cast(Triple, label_xyz.shape),
            annotated=_thin(np.flatnonzero(flat != UNLABELLED), rng),
            by_class={c: _thin(np.flatnonzero(flat == c), rng) for c in present},
        )


def _thin(indices: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    if len(indices) <= REMEMBERED_VOXELS:
        return indices
    return np.sort(rng.choice(indices, REMEMBERED_VOXELS, replace=False))


class RegionSampler:
    """Sampler of crops: the case uniform among annotated ones, then a voxel of it, then the place of the voxel.

    A share `foreground` of each batch is centred on a foreground voxel (nnU-Net rounds the same way: the last items of
    the batch). Its class is drawn uniformly among all classes, then its case uniformly among those that hold the class.
    nnU-Net draws the case first, so a class of few cases is rarely drawn. The other crops hold a uniformly drawn
    annotated voxel.

    Raises:
        ValueError: no case has an annotated voxel.
    """

    def __init__(self, cases: Sequence[AnnotatedCase], patch: Triple, foreground: float = 1 / 3) -> None:
        self.cases = cases
        self.patch = patch
        self.foreground = foreground
        self.usable = [i for i, case in enumerate(cases) if len(case.annotated)]
        if not self.usable:
            raise ValueError("no annotated voxel in any training case; annotate a region before training")
        present = sorted({c for case in cases for c in case.by_class})
        self.holders = [(c, [i for i, case in enumerate(cases) if c in case.by_class]) for c in present]

    def draw(self, batch: int, rng: np.random.Generator) -> list[tuple[int, Triple]]:
        """`batch` pairs of (case index, start of the crop)."""
        return [self._one(rng, self._wants_foreground(i, batch, rng)) for i in range(batch)]

    def _wants_foreground(self, index: int, batch: int, rng: np.random.Generator) -> bool:
        """Return whether a crop is centred on foreground; the expected share is exactly `foreground` for any batch."""
        wanted = batch * self.foreground
        position = batch - 1 - index
        return position < int(wanted) or (position == int(wanted) and rng.random() < wanted % 1)

    def _one(self, rng: np.random.Generator, foreground: bool) -> tuple[int, Triple]:
        if foreground and self.holders:
            class_, holders = self.holders[int(rng.integers(len(self.holders)))]
            index = holders[int(rng.integers(len(holders)))]
            case, voxels = self.cases[index], self.cases[index].by_class[class_]
            return index, place_centred(self._voxel(voxels, case.shape, rng), self.patch, case.shape)
        index = self.usable[int(rng.integers(len(self.usable)))]
        case = self.cases[index]
        return index, place_uniform(self._voxel(case.annotated, case.shape, rng), self.patch, case.shape, rng)

    @staticmethod
    def _voxel(indices: NDArray[np.int64], shape: Triple, rng: np.random.Generator) -> Triple:
        flat = int(indices[int(rng.integers(len(indices)))])
        return cast(Triple, tuple(int(v) for v in np.unravel_index(flat, shape)))
