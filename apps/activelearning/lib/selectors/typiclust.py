# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cold start: the most typical unit of each cluster (TypiClust)."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from lib.selectors.core_set import feature_matrix
from lib.selectors.steps import Selection, Taken, indices_of

MAX_CLUSTERS = 500


def typiclust(
    features: ArrayLike, labelled: ArrayLike | None, k: int, rng: np.random.Generator, neighbours: int = 20
) -> NDArray[np.intp]:
    """Return the indices that `typiclust_steps` takes, (min(k, U),)."""
    return indices_of(typiclust_steps(features, labelled, k, rng, neighbours))


def typiclust_steps(
    features: ArrayLike, labelled: ArrayLike | None, k: int, rng: np.random.Generator, neighbours: int = 20
) -> Selection:
    """Take `k` rows: the most typical one of each of the largest clusters that hold no labelled row.

    Typicality = 1 / mean distance to the nearest `neighbours` rows of the cluster (Hacohen et al. 2022, section 3.3).
    K-means with min(L + k, 500) clusters on `features` and `labelled` rows; clusters are visited by few labelled rows,
    then by size; when k exceeds their number they are visited again.

    Utility: typicality within the cluster of the row taken, infinite in a cluster of one.

    Shapes: features (U, D), labelled (L, D) or None -> min(k, U) steps.
    """
    rows = feature_matrix(features, "unlabelled").numpy()
    known = None if labelled is None or len(np.asarray(labelled)) == 0 else feature_matrix(labelled, "labelled").numpy()
    everything = rows if known is None else np.concatenate([rows, known])
    spread = everything.std(axis=0)
    everything = (everything - everything.mean(axis=0)) / np.where(spread > 0, spread, 1)
    distinct = len(np.unique(everything, axis=0))
    clusters = max(1, min((0 if known is None else len(known)) + k, MAX_CLUSTERS, distinct))
    seed = int(rng.integers(2**31))
    cluster = KMeans(clusters, n_init=4, random_state=seed).fit_predict(everything)
    mine = cluster[: len(rows)]
    taken = np.bincount(cluster[len(rows) :], minlength=clusters)
    sizes = np.bincount(mine, minlength=clusters)
    typicality = _typicality(everything[: len(rows)], mine, neighbours)
    ranked = {c: _most_typical_first(typicality, np.flatnonzero(mine == c)) for c in range(clusters)}
    for _ in range(min(k, len(rows))):
        left = [c for c in range(clusters) if ranked[c]]
        best = min(left, key=lambda c: (taken[c], -sizes[c], c))
        yield Taken(ranked[best].pop(0), partial(_within, typicality, mine == best))
        taken[best] += 1


def _typicality(rows: NDArray[np.float32], cluster: NDArray[np.intp], neighbours: int) -> NDArray[np.float64]:
    far = np.zeros(len(rows))
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        if len(members) > 1:
            near = NearestNeighbors(n_neighbors=min(neighbours, len(members) - 1)).fit(rows[members])
            far[members] = near.kneighbors()[0].mean(axis=1)
    return np.divide(1, far, out=np.full(len(far), np.inf), where=far > 0)


def _most_typical_first(typicality: NDArray[np.float64], members: NDArray[np.intp]) -> list[int]:
    return [int(i) for i in members[np.argsort(-typicality[members], kind="stable")]]


def _within(typicality: NDArray[np.float64], same_cluster: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(same_cluster, typicality, -np.inf)
