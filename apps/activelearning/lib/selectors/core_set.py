# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Core-set: greedy k-center over features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

CHUNK = 8192


def k_center(unlabelled: ArrayLike, labelled: ArrayLike | None, k: int) -> NDArray[np.intp]:
    """Indices of `k` rows of `unlabelled`, each the farthest from `labelled` and the ones before (Sener & Savarese).

    i* = argmax_u min_{l in labelled and chosen} ||x_u - x_l||; the first index among equals, so without labelled
    rows the first pick is row 0 (USIM, appendix C). Each pick costs one product of the features with one row.

    Shapes: unlabelled (U, D), labelled (L, D) or None -> (min(k, U),).

    Raises:
        ValueError: features that are not a finite matrix, or that disagree in width.
    """
    features = feature_matrix(unlabelled, "unlabelled")
    known = None if labelled is None or len(np.asarray(labelled)) == 0 else feature_matrix(labelled, "labelled")
    if known is not None and known.shape[1] != features.shape[1]:
        raise ValueError(f"features differ in width: {features.shape[1]} unlabelled, {known.shape[1]} labelled")
    nearest = np.full(len(features), np.inf, np.float32)
    if known is not None:
        for a in range(0, len(features), CHUNK):
            part = torch.cdist(features[a : a + CHUNK], known, compute_mode="donot_use_mm_for_euclid_dist")
            nearest[a : a + CHUNK] = part.min(dim=1).values.square().numpy()
    distances = SquaredDistances(features)
    chosen: list[int] = []
    while len(chosen) < min(k, len(features)):
        best = int(nearest.argmax())
        chosen.append(best)
        np.minimum(nearest, distances.to(best), out=nearest)
        nearest[chosen] = -1  # a chosen row is never drawn again, even where every distance is zero
    return np.array(chosen, dtype=np.intp)


class SquaredDistances:
    """||x_i - x_j||^2 of all rows to one row: ||x_i||^2 + ||x_j||^2 - 2 x_i x_j on centred features."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features - features.mean(dim=0)  # small norms lose less to cancellation
        self._norms = self._features.square().sum(dim=1)

    def to(self, row: int) -> NDArray[np.float32]:
        """Squared distance of every row to `row`, (U,), never negative, exactly 0 to itself."""
        products = torch.mv(self._features, self._features[row])
        squared = torch.sub(self._norms, products, alpha=2).add_(self._norms[row]).clamp_(min=0)
        squared[row] = 0
        return np.asarray(squared.numpy())


def feature_matrix(values: ArrayLike, what: str) -> torch.Tensor:
    """`values` as a float32 matrix (rows, width).

    Raises:
        ValueError: not a matrix, or not finite.
    """
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{what} features must be a matrix of rows and width, found the shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} features hold values that are not finite")
    return torch.from_numpy(matrix)
