# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Quality of pseudo labels between annotated slices: interpolated again from the queries, against ground truth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from eval.metrics.robustness import interpolation_quality
from eval.protocol.dataset import Dataset, load_truth

_AXES = (("x", "dx"), ("y", "dy"), ("z", "dz"))


def pseudo_quality(queries: pd.DataFrame, dataset: Dataset, train: Mapping[str, Any]) -> pd.DataFrame:
    """Mean Dice of the pseudo-labelled slices of every method after its last round, for every class.

    Columns: method, slices (pseudo-labelled, over images and seeds) and one per class. `train` holds the study's
    `pseudo_labels`, `pseudo_thickness` and `pseudo_axis`; empty where it makes none by signed distance, or where no two
    annotated slices are close enough (Burmeister et al. 2022, Table 10).
    """
    if train.get("pseudo_labels") != "signed_distance" or queries.empty:
        return pd.DataFrame()
    axis, thickness = int(train.get("pseudo_axis", 2)), int(train.get("pseudo_thickness", 10))
    start, size = _AXES[axis]
    cases = {case.id: case for case in dataset.cases}
    flat = queries[(queries["unit"] == "slice") & (queries[size] == 1)]
    rows = []
    for method, of_method in flat.groupby("method", sort=False):
        pseudo, truth = [], []
        for (_, image), own in of_method.groupby(["seed", "image"]):
            planes = np.moveaxis(load_truth(cases[str(image)]).label_xyz, axis, 0)
            for a, b in itertools.pairwise(sorted(own[start].unique())):
                if not 2 <= b - a <= thickness - 1:
                    continue
                between = signed_distance_between(planes[a], planes[b], int(b - a) - 1)
                if between is not None:
                    pseudo.append(between)
                    truth.append(planes[a + 1 : b])
        if pseudo:
            rows.append({"method": method, **_quality(pseudo, truth, dataset.foreground)})
    return pd.DataFrame(rows)


def signed_distance_between(
    top_xy: NDArray[np.uint8], bottom_xy: NDArray[np.uint8], n: int
) -> NDArray[np.uint8] | None:
    """The n slices between two annotated ones, (n, X, Y); None where a class does not overlap itself.

    Slice i of 1 .. n holds a class where `(1 - t) s(top) + t s(bottom) >= 0` with t = i / (n + 1). Here s is the
    distance inside minus the distance outside plus 0.5, in pixels. Higher classes overwrite lower ones.

    Source: Burmeister et al. 2022, app. A.
    """
    found = np.zeros((n, *top_xy.shape), dtype=np.uint8)
    t = (np.arange(1, n + 1) / (n + 1))[:, None, None]
    for value in sorted({*np.unique(top_xy), *np.unique(bottom_xy)} - {0}):
        a, b = top_xy == value, bottom_xy == value
        if not (a & b).any():
            return None
        found[(1 - t) * _distance(a) + t * _distance(b) >= 0] = value
    return found


def _distance(mask_xy: NDArray[np.bool_]) -> NDArray[np.float64]:
    inside, outside = (ndimage.distance_transform_edt(m) for m in (mask_xy, ~mask_xy))
    return np.asarray(inside - outside + 0.5)


def _quality(
    pseudo: Sequence[NDArray[np.uint8]], truth: Sequence[NDArray[np.uint8]], classes: Mapping[str, int]
) -> dict[str, float]:
    """Blocks may lie in images of different sizes: the mean over all their slices."""
    weights = dict.fromkeys(classes, 0)
    sums = dict.fromkeys(classes, 0.0)
    for made, true in zip(pseudo, truth, strict=True):
        for one_made, one_true in zip(made, true, strict=True):
            for name, value in interpolation_quality(one_made[None], one_true[None], classes).items():
                if not np.isnan(value):
                    weights[name] += 1
                    sums[name] += value
    means = {name: sums[name] / weights[name] if weights[name] else float("nan") for name in classes}
    return {"slices": sum(len(made) for made in pseudo), **means}
