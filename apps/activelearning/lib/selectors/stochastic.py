# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Stochastic batches: random groups of units, of which the most uncertain group is taken whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

STATISTICS = ("mean", "sum", "max")


def stochastic_batch(
    scores: ArrayLike,
    k: int,
    rng: np.random.Generator,
    *,
    statistic: str = "mean",
    keep_last: bool = False,
    groups: int | None = None,
    resample: bool = False,
) -> NDArray[np.intp]:
    """Indices of the group of `k` units whose scores have the highest `statistic` (Gaillochet et al. 2023).

    Without resampling the pool is permuted and cut into consecutive groups of `k`; a shorter last one is dropped
    unless `keep_last` (ALUNET, with `statistic="sum"`), and only the first `groups` are looked at where given. With
    `resample`, `groups` (default floor(U / k)) groups are drawn independently, each without replacement. Ties go to the
    first group.

    Shapes: scores (U,) -> (min(k, U),).

    Raises:
        ValueError: k or groups below one, an unknown statistic, or scores that are not one finite number per unit.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("a stochastic batch needs one finite score a unit")
    if k < 1 or (groups is not None and groups < 1):
        raise ValueError(f"a stochastic batch needs at least one unit and one group, found k = {k}, groups = {groups}")
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, found {statistic!r}")
    units = len(values)
    if units <= k:
        return np.asarray(rng.permutation(units))
    if resample:
        drawn = [rng.choice(units, k, replace=False) for _ in range(groups or units // k)]
    else:
        order = rng.permutation(units)
        last = units if keep_last else units - units % k
        drawn = [order[a : min(a + k, last)] for a in range(0, last, k)][:groups]
    worth = [getattr(values[group], statistic)() for group in drawn]
    return np.asarray(drawn[int(np.argmax(worth))])
