# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""From probabilities to a label map."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
_AT_ONCE = 1 << 20  # voxels of which all classes are in memory


def label_map(
    probs_cxyz: NDArray[np.floating[Any]],
    confidence: float = 0.0,
    smallest: Mapping[int, float] | None = None,
    single: Collection[int] = (),
) -> NDArray[np.uint8]:
    """Most probable class of every voxel (X, Y, Z), without components that are too uncertain, too small or apart.

    A connected component K (26 neighbours) of a foreground class c is kept only if these hold:

        1/|K| sum_{v in K} p_c(v) >= confidence,    |K| >= smallest[c],    and K is the largest if c is in `single`.

    Voxels of others go to the most probable class that they were not taken from, and are checked again with the
    component that they join. Background is always kept, so the procedure ends.

    With 0 in `single`, foreground outside of the largest component of all classes together becomes background first.

    Crops are centred on classes, so a class is more frequent in crops than in images, and the model predicts it too
    often. In images without the class, such false positives are small and uncertain; otherwise components are large and
    certain.

    Args:
        probs_cxyz: (C, X, Y, Z), background first.
        confidence: least mean probability of a component. 0 sets none.
        smallest: least number of voxels of a component per class. Other classes have no limit.
        single: classes of one component. 0 is all foreground together.
    """
    label_xyz = np.asarray(probs_cxyz.argmax(axis=0)).astype(np.uint8)
    return without_doubted(label_xyz, probs_cxyz, confidence, smallest or {}, single)


def without_doubted(
    label_xyz: NDArray[np.uint8],
    probs_cxyz: NDArray[np.floating[Any]],
    confidence: float,
    smallest: Mapping[int, float],
    single: Collection[int] = (),
) -> NDArray[np.uint8]:
    """`label_map` from the most probable classes on: `label_xyz` (X, Y, Z) is changed in place and returned.

    `probs_cxyz` may be on disk: classes are read one at a time, and all of them only at doubtful voxels.
    """
    if 0 in single:
        label_xyz[_outside_largest(label_xyz > 0)] = 0
    looked_at = {c for c in range(1, len(probs_cxyz)) if confidence > 0 or smallest.get(c, 0) > 1 or c in single}
    refused: dict[int, NDArray[np.bool_]] = {}
    pending = sorted(looked_at)
    while pending:
        class_ = pending.pop()
        mask_xyz = label_xyz == class_
        doubted_xyz = _doubted(mask_xyz, probs_cxyz[class_], confidence, smallest.get(class_, 0))
        if class_ in single:
            doubted_xyz |= _outside_largest(mask_xyz & ~doubted_xyz)
        if doubted_xyz.any():
            refused[class_] = refused[class_] | doubted_xyz if class_ in refused else doubted_xyz
            _give_on(label_xyz, probs_cxyz, doubted_xyz, refused)
            joined = set(np.unique(label_xyz[doubted_xyz]).tolist()) & looked_at
            pending += sorted(joined - set(pending))
    return label_xyz


def _give_on(
    label_xyz: NDArray[np.uint8],
    probs_cxyz: NDArray[np.floating[Any]],
    doubted_xyz: NDArray[np.bool_],
    refused: Mapping[int, NDArray[np.bool_]],
) -> None:
    """Doubted voxels get the most probable class that they were not taken from, a bounded number at a time."""
    step = max(1, _AT_ONCE // max(1, doubted_xyz[0].size))
    for cut in (slice(x, x + step) for x in range(0, len(doubted_xyz), step)):
        here = doubted_xyz[cut]
        if not here.any():
            continue
        left_cv = probs_cxyz[:, cut][:, here].astype(np.float32)
        for other, refused_xyz in refused.items():
            left_cv[other, refused_xyz[cut][here]] = -1
        label_xyz[cut][here] = left_cv.argmax(axis=0)


def _outside_largest(mask_xyz: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask outside of its largest component; the first one of equals is kept."""
    outside_xyz = np.zeros_like(mask_xyz)
    for box in ndimage.find_objects(mask_xyz.view(np.uint8)):
        parts_xyz, count = ndimage.label(mask_xyz[box], NEIGHBOURS)
        if count > 1:
            largest = 1 + int(np.bincount(parts_xyz.ravel())[1:].argmax())
            outside_xyz[box] = (parts_xyz > 0) & (parts_xyz != largest)
    return outside_xyz


def _doubted(
    mask_xyz: NDArray[np.bool_], probs_xyz: NDArray[np.floating[Any]], confidence: float, smallest: float
) -> NDArray[np.bool_]:
    """Voxels of the components of mean probability below `confidence`, or of fewer voxels than `smallest`."""
    doubted_xyz = np.zeros_like(mask_xyz)
    # Components and their sums take many times the memory of a mask, so they are only made where the class is.
    for box in ndimage.find_objects(mask_xyz.view(np.uint8)):
        parts_xyz, count = ndimage.label(mask_xyz[box], NEIGHBOURS)
        doubted = np.bincount(parts_xyz.ravel(), minlength=count + 1) < smallest
        if confidence > 0:
            doubted[1:] |= np.asarray(ndimage.mean(probs_xyz[box], parts_xyz, np.arange(1, count + 1))) < confidence
        doubted[0] = False
        doubted_xyz[box] = doubted[parts_xyz]
    return doubted_xyz
