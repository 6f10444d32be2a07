# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Inter-rater agreement on a region: Dice per class; arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.partial_labels import UNLABELLED, LabelMap


def class_agreement(
    mine_xyz: LabelMap, other_xyz: LabelMap, classes: Mapping[str, int]
) -> dict[str, tuple[float | None, int, int]]:
    """Dice = 2 |A and B| / (|A| + |B|) and the voxels of A and B of every class, where both annotators labelled.

    None if neither drew the class, since its absence in both readings is not a comparison.
    """
    found: dict[str, tuple[float | None, int, int]] = {}
    for name, (shared, a, b) in zip(classes, class_overlaps(mine_xyz, other_xyz, classes).tolist(), strict=True):
        found[name] = (2 * shared / (a + b) if a + b else None, a, b)
    return found


def class_overlaps(mine_xyz: LabelMap, other_xyz: LabelMap, classes: Mapping[str, int]) -> NDArray[np.int64]:
    """|A and B|, |A| and |B| in voxels of every class, where both are labelled, (C, 3)."""
    both = (mine_xyz != UNLABELLED) & (other_xyz != UNLABELLED)
    counts_cv = np.zeros((len(classes), 3), np.int64)
    for row, value in zip(counts_cv, classes.values(), strict=True):
        mine, other = (mine_xyz == value) & both, (other_xyz == value) & both
        row[:] = np.count_nonzero(mine & other), np.count_nonzero(mine), np.count_nonzero(other)
    return counts_cv


def summarise(pairs: Iterable[Mapping[str, Any]], classes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Mean Dice of every class over the regions two people answered, and how many of these showed the class."""
    listed = list(pairs)
    found = {}
    for name in classes:
        values = [p["classes"][name]["dice"] for p in listed if p["classes"].get(name, {}).get("dice") is not None]
        found[name] = {"mean_dice": float(np.mean(values)) if values else None, "regions": len(values)}
    return found
