# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Paired tests between two methods over the same seeds or cases, and Holm's correction over a family of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ttest_rel, wilcoxon

Test = Literal["t", "wilcoxon", "permutation"]
# Sign flips that are all tried; beyond, they are drawn.
_EXACT = 14
_BLOCK = 1000


def paired_p(
    first: ArrayLike,
    second: ArrayLike,
    test: Test = "t",
    *,
    rng: np.random.Generator | None = None,
    permutations: int = 9999,
) -> float:
    """Two-sided p of a paired test between `first` (N,) and `second` (N,); pairs with a NaN are left out.

    `t`: paired t-test. A difference that is the same in every pair is certain (p = 0) unless it is 0 (p = 1).
    `wilcoxon`: signed-rank test, zero differences dropped. `permutation`: share of sign flips of the differences whose
    mean is as far from 0; all 2^N of them for N <= 14, else `permutations` drawn with `rng`: (hits + 1) / (drawn + 1).

    Raises:
        ValueError: vectors of different lengths, fewer than two pairs, an unknown test, or many pairs without `rng`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a paired test needs two equally long vectors, found {a.shape} and {b.shape}")
    z = (a - b)[~np.isnan(a - b)]
    if z.size < 2:
        raise ValueError(f"a paired test needs two or more pairs, found {z.size}")
    if test == "t":
        if np.ptp(z) == 0:
            return 1.0 if z[0] == 0 else 0.0
        return float(ttest_rel(z, np.zeros_like(z)).pvalue)
    if test == "wilcoxon":
        return 1.0 if not z.any() else float(wilcoxon(z).pvalue)
    if test == "permutation":
        return _permutation_p(z, rng, permutations)
    raise ValueError(f"test {test!r} is none of t, wilcoxon, permutation")


def _permutation_p(z: NDArray[np.float64], rng: np.random.Generator | None, permutations: int) -> float:
    # A flip that gives the same mean up to rounding is as extreme.
    bar = abs(z.sum()) * (1 - 1e-12) - 1e-15
    if z.size <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**z.size)[:, None] >> np.arange(z.size)) & 1)
        return float(np.mean(np.abs(signs @ z) >= bar))
    if rng is None:
        raise ValueError(f"{z.size} pairs have too many sign flips to try all; pass a Generator to draw them")
    hits, left = 0, permutations
    while left:  # in blocks, which bounds the memory
        signs = 1 - 2 * rng.integers(0, 2, (min(left, _BLOCK), z.size), dtype=np.int8)
        hits, left = hits + int(np.count_nonzero(np.abs(signs @ z) >= bar)), left - len(signs)
    return (hits + 1) / (permutations + 1)


def holm_adjust(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p values, in the order given: max_{j <= i} min(1, (n - j) p_(j)); NaN counts as 1."""
    p = np.nan_to_num(np.asarray(p_values, dtype=np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    scaled = np.minimum(1.0, p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted
