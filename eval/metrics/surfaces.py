# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Distances between two surfaces, computed once and read as Hausdorff, mean distance or surface Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

# Above this share of surface voxels in the box around both masks, a distance transform beats a search tree.
_RAGGED = 0.35


@dataclass(frozen=True)
class Surfaces:
    """Distances in mm from every surface voxel of the prediction to the truth's surface, and the other way round.

    A surface voxel belongs to the mask and has a face neighbour outside of it (outside of the image counts as outside).
    `undefined` is None when both masks hold voxels; else NaN (both empty) or the image's diagonal in mm (one empty).
    """

    to_truth: NDArray[np.float64]
    to_prediction: NDArray[np.float64]
    undefined: float | None = None

    @classmethod
    def between(
        cls, prediction_xyz: ArrayLike, truth_xyz: ArrayLike, *, spacing: Sequence[float], full: bool = False
    ) -> Surfaces:
        """Both directions for two boolean masks of one shape; `spacing` in mm per voxel.

        `full=True` lets neighbours that share an edge or a corner make a surface too (Burmeister et al. 2022).

        Raises:
            ValueError: masks of different shapes, or not one positive spacing an axis.
        """
        prediction, truth = np.asarray(prediction_xyz, dtype=bool), np.asarray(truth_xyz, dtype=bool)
        steps = np.asarray(spacing, dtype=np.float64)
        if prediction.shape != truth.shape:
            raise ValueError(
                f"prediction has shape {prediction.shape} but truth {truth.shape}; compare masks on one grid"
            )
        if steps.shape != (prediction.ndim,) or not np.all(steps > 0):
            raise ValueError(f"spacing {list(spacing)} must be {prediction.ndim} positive lengths in mm, one an axis")
        box = _bounding_box(prediction | truth)
        nothing = np.zeros(0)
        if box is None:
            return cls(nothing, nothing, float("nan"))
        # Cropped before the counts: most of a scan is far from both masks.
        a, b = prediction[box], truth[box]
        if not a.any() or not b.any():
            return cls(nothing, nothing, float(np.linalg.norm(np.asarray(prediction.shape) * steps)))
        edge_a, edge_b = _edge(a, full), _edge(b, full)
        if np.count_nonzero(edge_a | edge_b) > _RAGGED * edge_a.size:
            return cls(_by_transform(edge_a, edge_b, steps), _by_transform(edge_b, edge_a, steps))
        return cls(_by_tree(edge_a, edge_b, steps), _by_tree(edge_b, edge_a, steps))

    def hausdorff(self, percentile: float = 100, *, pooled: bool = False) -> float:
        """Largest percentile of distances in mm over both directions; `pooled`: one percentile of all of them."""
        if self.undefined is not None:
            return self.undefined
        if pooled:
            return float(np.percentile(np.concatenate([self.to_truth, self.to_prediction]), percentile))
        return float(max(np.percentile(self.to_truth, percentile), np.percentile(self.to_prediction, percentile)))

    def mean(self, *, directed: bool = False) -> float:
        """Mean distance in mm over the points of both surfaces; `directed`: mean of the two directions' means."""
        if self.undefined is not None:
            return self.undefined
        if directed:
            return float((self.to_truth.mean() + self.to_prediction.mean()) / 2)
        return float(np.concatenate([self.to_truth, self.to_prediction]).mean())

    def dice(self, tolerance: float) -> float:
        """Share of all surface points within `tolerance` mm of the other surface; 0 when one mask is empty.

        Raises:
            ValueError: a negative tolerance.
        """
        if tolerance < 0:
            raise ValueError(f"tolerance {tolerance} mm is negative; give a distance of 0 or more")
        if self.undefined is not None:
            return float("nan") if np.isnan(self.undefined) else 0.0
        return float(np.mean(np.concatenate([self.to_truth, self.to_prediction]) <= tolerance))


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """Smallest box around the mask, found axis by axis in the box of the earlier axes; None for an empty mask."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        rest = mask[tuple(box)]
        occupied = np.flatnonzero(rest.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _edge(mask: NDArray[np.bool_], full: bool = False) -> NDArray[np.bool_]:
    """Voxels of the mask with a neighbour outside of it; shifted slices are several times faster than an erosion.

    Neighbours share a face, or with `full` also an edge or a corner (the box erosion, one axis after the other).
    """
    inner = mask.copy()
    for axis in range(mask.ndim):
        before = inner.copy() if full else mask
        low: list[slice] = [slice(None)] * mask.ndim
        high = list(low)
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        inner[tuple(high)] &= before[tuple(low)]
        inner[tuple(low)] &= before[tuple(high)]
        low[axis], high[axis] = slice(0, 1), slice(-1, None)
        inner[tuple(low)] = False
        inner[tuple(high)] = False
    return mask & ~inner


def _by_tree(source: NDArray[np.bool_], target: NDArray[np.bool_], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of every source voxel to the nearest target voxel; those that are targets themselves need no search."""
    away = np.argwhere(source & ~target)
    distances = np.zeros(np.count_nonzero(source))
    if len(away):
        tree = cKDTree(np.argwhere(target) * steps, balanced_tree=False, compact_nodes=False)
        distances[: len(away)] = tree.query(away * steps)[0]
    return distances


def _by_transform(
    source: NDArray[np.bool_], target: NDArray[np.bool_], steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The same from a Euclidean distance transform of the box."""
    return np.asarray(distance_transform_edt(~target, sampling=steps)[source])
