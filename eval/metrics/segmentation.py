# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentation measures of one class in one case: boolean masks in, one float out.

Declared rules for empty masks: a class absent in prediction and truth is not counted (NaN); when one of the two is
empty, Dice is 0 and every distance is the diagonal of the image in mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.metrics.surfaces import Surfaces

Spacing = Sequence[float]


def dice(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> float:
    """Dice = 2 TP / (2 TP + FP + FN), any number of axes; NaN when both are empty (nnActive specification, section 8).

    Raises:
        ValueError: masks of different shapes.
    """
    tp, fp, fn, _ = _confusion(prediction_xyz, truth_xyz)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")


def sensitivity(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> float:
    """Sensitivity = TP / (TP + FN); NaN without a true voxel (Burmeister et al. 2022).

    Raises:
        ValueError: masks of different shapes.
    """
    tp, _, fn, _ = _confusion(prediction_xyz, truth_xyz)
    return tp / (tp + fn) if tp + fn else float("nan")


def specificity(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> float:
    """Specificity = TN / (TN + FP); NaN when every voxel is true (Burmeister et al. 2022).

    Raises:
        ValueError: masks of different shapes.
    """
    _, fp, _, tn = _confusion(prediction_xyz, truth_xyz)
    return tn / (tn + fp) if tn + fp else float("nan")


def relative_volume_error(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> float:
    """RVE = 100 |V_prediction - V_truth| / V_truth in percent; NaN without a true voxel (Chlebus et al., USS).

    Raises:
        ValueError: masks of different shapes.
    """
    tp, fp, fn, _ = _confusion(prediction_xyz, truth_xyz)
    return 100.0 * abs(fp - fn) / (tp + fn) if tp + fn else float("nan")


def hausdorff(prediction_xyz: ArrayLike, truth_xyz: ArrayLike, *, spacing: Spacing = (1.0, 1.0, 1.0)) -> float:
    """Largest distance in mm from either surface to the other; `spacing` in mm per voxel.

    Raises:
        ValueError: masks of different shapes, or not one positive spacing an axis.
    """
    return Surfaces.between(prediction_xyz, truth_xyz, spacing=spacing).hausdorff()


def hausdorff95(
    prediction_xyz: ArrayLike,
    truth_xyz: ArrayLike,
    *,
    spacing: Spacing = (1.0, 1.0, 1.0),
    pooled: bool = False,
) -> float:
    """HD95 in mm: the larger of the two directed 95th percentiles of surface distances (Gaillochet et al. 2023; MONAI).

    `pooled=True` takes one percentile of both directions together instead (Burmeister et al. 2022).

    Raises:
        ValueError: masks of different shapes, or not one positive spacing an axis.
    """
    return Surfaces.between(prediction_xyz, truth_xyz, spacing=spacing).hausdorff(95, pooled=pooled)


def mean_surface_distance(
    prediction_xyz: ArrayLike, truth_xyz: ArrayLike, *, spacing: Spacing = (1.0, 1.0, 1.0)
) -> float:
    """Average symmetric surface distance in mm: (sum of both directions) / (number of points of both surfaces).

    Raises:
        ValueError: masks of different shapes, or not one positive spacing an axis.
    """
    return Surfaces.between(prediction_xyz, truth_xyz, spacing=spacing).mean()


def surface_dice(
    prediction_xyz: ArrayLike,
    truth_xyz: ArrayLike,
    *,
    tolerance: float,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> float:
    """Share of the points of both surfaces that lie within `tolerance` mm of the other surface.

    Raises:
        ValueError: masks of different shapes, not one positive spacing an axis, or a negative tolerance.
    """
    return Surfaces.between(prediction_xyz, truth_xyz, spacing=spacing).dice(tolerance)


def dice_per_slice(prediction_xyz: ArrayLike, truth_xyz: ArrayLike, *, axis: int = 2) -> float:
    """2D Dice: mean over the slices along `axis` in which the class occurs; NaN when it occurs in none.

    Raises:
        ValueError: masks of different shapes.
    """
    prediction, truth = _masks(prediction_xyz, truth_xyz)
    other = tuple(a for a in range(prediction.ndim) if a != axis)
    both = 2.0 * np.count_nonzero(prediction & truth, axis=other)
    total = np.count_nonzero(prediction, axis=other) + np.count_nonzero(truth, axis=other)
    occurs = total > 0
    return float(np.mean(both[occurs] / total[occurs])) if occurs.any() else float("nan")


def _masks(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    prediction, truth = np.asarray(prediction_xyz, dtype=bool), np.asarray(truth_xyz, dtype=bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but truth {truth.shape}; compare masks on one grid")
    return prediction, truth


def _confusion(prediction_xyz: ArrayLike, truth_xyz: ArrayLike) -> tuple[int, int, int, int]:
    """(TP, FP, FN, TN) in voxels."""
    prediction, truth = _masks(prediction_xyz, truth_xyz)
    tp = int(np.count_nonzero(prediction & truth))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return tp, fp, fn, truth.size - tp - fp - fn
