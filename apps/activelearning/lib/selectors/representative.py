# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Representativeness: equal shares of strata, clusters of features, distance to labelled units (Burmeister 2022)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import MeanShift, estimate_bandwidth
from sklearn.decomposition import PCA

from lib.selectors.core_set import feature_matrix

OUTLIER = -1


def reduced_features(features: ArrayLike, components: int = 10, published: bool = False) -> NDArray[np.float64]:
    """Features (N, D), scaled to [0, 1] each, on their first principal components, (N, min(components, N, D)).

    `published` fits on the scaled features and projects the raw ones, as in the paper's code.
    """
    raw = np.asarray(features, dtype=np.float64)
    low = raw.min(axis=0)
    scaled = (raw - low) / (raw.max(axis=0) - low + 1e-10)
    pca = PCA(n_components=min(components, *raw.shape), svd_solver="full").fit(scaled)
    return np.asarray(pca.transform(raw if published else scaled))


def mean_shift_clusters(points: ArrayLike, bandwidth: float | None = None) -> NDArray[np.intp]:
    """Cluster of each row by mean shift, -1 for outliers; the bandwidth is estimated where none is given."""
    values = np.asarray(points, dtype=np.float64)
    width = bandwidth or estimate_bandwidth(values, quantile=0.3, random_state=0) or 1.0
    return np.asarray(MeanShift(bandwidth=width, cluster_all=False).fit(values).labels_)


def stratified(
    strata: Sequence[Hashable],
    labelled: Sequence[bool] | NDArray[np.bool_],
    k: int,
    rng: np.random.Generator,
    equal: str = "fraction",
) -> NDArray[np.intp]:
    """Indices of `k` unlabelled units that even out what is labelled over the strata; ties at random.

    Each pick comes from the stratum with the least labelled `"fraction"` (the paper's code) or `"count"` (the paper's
    text), which is updated after every pick. A stratum of -1 holds outliers and comes last.

    Shapes: one entry of `strata` and `labelled` a unit, labelled ones included -> (min(k, unlabelled),).

    Raises:
        ValueError: an unknown rule, or sequences of different lengths.
    """
    if equal not in ("fraction", "count"):
        raise ValueError(f'strata are evened out by "fraction" or "count", found {equal!r}')
    done = np.array(labelled, dtype=bool)
    if len(strata) != len(done):
        raise ValueError(f"one stratum a unit is needed, found {len(strata)} for {len(done)} units")
    names = {name: i for i, name in enumerate(dict.fromkeys(strata))}
    code = np.array([names[name] for name in strata], dtype=np.intp)
    sizes = np.bincount(code, minlength=len(names))
    counts = np.bincount(code[done], minlength=len(names))
    left = sizes - counts
    outliers = np.array([name == OUTLIER for name in names], dtype=bool)
    queues = {c: list(rng.permutation(np.flatnonzero((code == c) & ~done))) for c in range(len(names))}
    chosen: list[int] = []
    while len(chosen) < k and left.any():
        share = counts / sizes if equal == "fraction" else counts.astype(float)
        share = np.where(outliers, share + sizes.max() + 1, share)
        share[left == 0] = np.inf
        lowest = np.flatnonzero(share == share.min())
        weights = left[lowest] / left[lowest].sum()  # a unit among all units of the tied strata, not a stratum
        stratum = int(rng.choice(lowest, p=weights))
        chosen.append(int(queues[stratum].pop()))
        counts[stratum] += 1
        left[stratum] -= 1
    return np.array(chosen, dtype=np.intp)


def farthest_on_average(unlabelled: ArrayLike, labelled: ArrayLike | None, k: int) -> NDArray[np.intp]:
    """Indices of `k` rows, each with the largest mean distance to `labelled` and the rows chosen before (DistRS).

    After each pick the sums of distances are updated; published code keeps stale ids and returns a run of consecutive
    pool entries instead. Ties go to the first row, so without labelled rows the first pick is row 0.

    Shapes: unlabelled (U, D), labelled (L, D) or None -> (min(k, U),).
    """
    features = feature_matrix(unlabelled, "unlabelled")
    total = np.zeros(len(features))
    if labelled is not None and len(np.asarray(labelled)):
        known = feature_matrix(labelled, "labelled")
        for row in known:
            total += _distance(features, row)
    chosen: list[int] = []
    free = np.ones(len(features), bool)
    while len(chosen) < min(k, len(features)):
        best = int(np.where(free, total, -1).argmax())
        chosen.append(best)
        free[best] = False
        total += _distance(features, features[best])
    return np.array(chosen, dtype=np.intp)


def mean_distances(unlabelled: ArrayLike, labelled: ArrayLike) -> NDArray[np.float64]:
    """Mean Euclidean distance of each row (U, D) to the rows of `labelled` (L, D), (U,)."""
    features, known = feature_matrix(unlabelled, "unlabelled"), feature_matrix(labelled, "labelled")
    return np.asarray(sum(_distance(features, row) for row in known) / len(known))


def _distance(features: torch.Tensor, row: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray((features - row).double().square_().sum(dim=1).sqrt_().numpy())


def unique_first(order: Sequence[int], scans: Sequence[Hashable], k: int) -> list[int]:
    """The first `k` of `order`, taking a second unit of a scan only when every scan has given one."""
    seen: set[Hashable] = set()
    front, rest = list[int](), list[int]()
    for i in order:
        (rest if scans[i] in seen else front).append(i)
        seen.add(scans[i])
    return (front + rest)[:k]
