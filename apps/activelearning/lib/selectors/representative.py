# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Representativeness: equal shares of strata, clusters of features, distance to labelled units (Burmeister 2022)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import MeanShift, estimate_bandwidth
from sklearn.decomposition import PCA

from lib.selectors.core_set import feature_matrix
from lib.selectors.steps import Selection, Taken, indices_of

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
    """Return the indices that `stratified_steps` takes, (min(k, unlabelled),)."""
    return indices_of(stratified_steps(strata, labelled, k, rng, equal))


def stratified_steps(
    strata: Sequence[Hashable],
    labelled: Sequence[bool] | NDArray[np.bool_],
    k: int,
    rng: np.random.Generator,
    equal: str = "fraction",
) -> Selection:
    """Take `k` unlabelled units that even out what is labelled over the strata; ties at random.

    Each pick comes from the stratum with the least labelled `"fraction"` (the paper's code) or `"count"` (the paper's
    text), which is updated after every pick. A stratum of -1 holds outliers and comes last.

    Utility: minus the labelled share (or count) of the stratum; outliers lie below all others.

    Shapes: one entry of `strata` and `labelled` per unit, labelled ones included -> min(k, unlabelled) steps.

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
    for _ in range(min(k, int(left.sum()))):
        share = counts / sizes if equal == "fraction" else counts.astype(float)
        share = np.where(outliers, share + sizes.max() + 1, share)
        open_share = np.where(left == 0, np.inf, share)
        lowest = np.flatnonzero(open_share == open_share.min())
        weights = left[lowest] / left[lowest].sum()  # a unit among all units of the tied strata, not a stratum
        stratum = int(rng.choice(lowest, p=weights))
        unit = int(queues[stratum].pop())
        yield Taken(unit, partial(_free_share, done, share, code))
        done[unit] = True
        counts[stratum] += 1
        left[stratum] -= 1


def _free_share(done: NDArray[np.bool_], share: NDArray[np.float64], code: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.where(done, np.nan, 0.0 - share[code])


def farthest_on_average(unlabelled: ArrayLike, labelled: ArrayLike | None, k: int) -> NDArray[np.intp]:
    """Return the indices that `farthest_on_average_steps` takes, (min(k, U),)."""
    return indices_of(farthest_on_average_steps(unlabelled, labelled, k))


def farthest_on_average_steps(unlabelled: ArrayLike, labelled: ArrayLike | None, k: int) -> Selection:
    """Take `k` rows, each with the largest mean distance to `labelled` and the rows chosen before (DistRS).

    After each pick the sums of distances are updated; published code keeps stale ids and returns a run of consecutive
    pool entries instead. Ties go to the first row, so without labelled rows the first pick is row 0.

    Utility: the mean distance; infinite where there is nothing to measure it to.

    Shapes: unlabelled (U, D), labelled (L, D) or None -> min(k, U) steps.
    """
    features = feature_matrix(unlabelled, "unlabelled")
    total, count = np.zeros(len(features)), 0
    if labelled is not None and len(np.asarray(labelled)):
        known = feature_matrix(labelled, "labelled")
        for row in known:
            total += _distance(features, row)
        count = len(known)
    free = np.ones(len(features), bool)
    for _ in range(min(k, len(features))):
        best = int(np.where(free, total, -1).argmax())
        yield Taken(best, partial(_mean, total, count))
        free[best] = False
        total += _distance(features, features[best])
        count += 1


def _mean(total: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return total / count if count else np.full(len(total), np.inf)


def distance_steps(
    features: ArrayLike, labelled: ArrayLike, k: int, rng: np.random.Generator, components: int = 10
) -> Selection:
    """Take what `farthest_on_average_steps` takes of reduced features; nothing is drawn from `rng`."""
    return farthest_on_average_steps(*_reduced_apart(features, labelled, components), k)


def cluster_steps(
    features: ArrayLike,
    labelled: ArrayLike,
    k: int,
    rng: np.random.Generator,
    components: int = 10,
    bandwidth: float = 0.0,
) -> Selection:
    """Take units that even out the annotated share of mean-shift clusters of reduced features (ClustRS).

    `bandwidth` 0 estimates it.
    """
    free, known = _reduced_apart(features, labelled, components)
    clusters = mean_shift_clusters(np.concatenate([free, known]), bandwidth or None).tolist()
    annotated = np.arange(len(clusters)) >= len(free)
    for taken in stratified_steps(clusters, annotated, k, rng):
        yield Taken(taken.row, partial(_first, taken, len(free)))


def _first(taken: Taken, units: int) -> NDArray[np.floating[Any]]:
    """Utilities of the units, without those of the labelled rows behind them."""
    return taken.utilities()[:units]


def _reduced_apart(
    features: ArrayLike, labelled: ArrayLike, components: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sets of rows on the principal components of all."""
    free, known = np.asarray(features), np.asarray(labelled)
    points = reduced_features(np.concatenate([free, known]) if len(known) else free, components)
    return points[: len(free)], points[len(free) :]


def _distance(features: torch.Tensor, row: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray((features - row).double().square_().sum(dim=1).sqrt_().numpy())
