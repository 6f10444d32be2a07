# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""BADGE: k-means++ seeding on gradient embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.selectors.core_set import SquaredDistances, feature_matrix


def kmeans_plus_plus(embeddings: ArrayLike, k: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of `k` rows: the first has the largest norm, each further one is drawn with probability D^2 / sum D^2.

    D is the Euclidean distance to the nearest row chosen before (Ash et al. 2020; USIM, appendix C). No row is drawn
    twice; where all rows left coincide with chosen ones the draw is uniform over them.

    Shapes: embeddings (U, D) -> (min(k, U),).

    Raises:
        ValueError: embeddings that are not a finite matrix.
    """
    matrix = feature_matrix(embeddings, "embedding")
    distances = SquaredDistances(matrix)
    wanted = min(k, len(matrix))
    if wanted < 1:
        return np.empty(0, dtype=np.intp)
    chosen = [int(matrix.square().sum(dim=1).argmax())]
    nearest = distances.to(chosen[0])
    while len(chosen) < wanted:
        chosen.append(_draw(nearest, chosen, rng))
        np.minimum(nearest, distances.to(chosen[-1]), out=nearest)
        nearest[chosen] = 0
    return np.array(chosen, dtype=np.intp)


def _draw(weights: NDArray[np.float32], chosen: list[int], rng: np.random.Generator) -> int:
    cumulative = np.cumsum(weights, dtype=np.float64)
    if cumulative[-1] > 0:
        drawn = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        if drawn < len(weights):
            return drawn
        return int(np.flatnonzero(weights)[-1])  # the draw was rounded up to the whole sum
    left = np.setdiff1d(np.arange(len(weights)), chosen)
    return int(rng.choice(left))
