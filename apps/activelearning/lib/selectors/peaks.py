# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Slices at the peaks of a volume's uncertainty profile (USS, Chlebus et al. 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, signal


def slice_peaks(scores: ArrayLike, distance: int = 5) -> NDArray[np.intp]:
    """Local maxima of one score per slice, at least `distance` slices apart, highest first.

    Higher peaks win within `distance`, the later one among equals; the first and last slice are never peaks; a plateau
    counts at its middle, rounded down. Equal heights are listed by index.

    Shapes: scores (S,) -> (P,).

    Raises:
        ValueError: a distance below one, or scores that are not one number per slice.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError("slice peaks need one number a slice")
    if distance < 1:
        raise ValueError(f"the distance between peaks must be one slice or more, found {distance}")
    peaks, _ = signal.find_peaks(values, distance=distance)
    return np.asarray(peaks[np.argsort(-values[peaks], kind="stable")])


def ranked_slices(scores: ArrayLike, taken: ArrayLike, distance: int = 5) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Free slices in the order to ask for them, and the tier of each.

    Tier 0 are free peaks; tier 1, highest first, slices at least `distance` from those before and from `taken` ones;
    tier 2 the rest. A pool with too few peaks can so still give a full batch.

    Shapes: scores (S,), taken (S,) bool -> (free slices,), (free slices,).
    """
    values, used = np.asarray(scores, dtype=np.float64), np.asarray(taken, dtype=bool)
    order = [int(i) for i in slice_peaks(values, distance) if not used[i]]
    peaks, rest = len(order), list[int]()
    close = used | np.isin(np.arange(values.size), order)
    close = ndimage.binary_dilation(close, np.ones(2 * distance - 1, bool))
    chosen = set(order)
    for i in np.argsort(-values, kind="stable"):
        if used[i] or i in chosen:
            continue
        if close[i]:
            rest.append(int(i))
            continue
        order.append(int(i))
        close[max(0, i - distance + 1) : i + distance] = True
    tiers = [0] * peaks + [1] * (len(order) - peaks) + [2] * len(rest)
    return np.array(order + rest, dtype=np.intp), np.array(tiers, dtype=np.intp)
