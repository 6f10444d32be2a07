# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facility-location mutual information and its greedy maximisation (USIM)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

OPTIMIZERS = ("lazy", "naive", "stochastic")
_EPSILON = 0.01  # stochastic greedy is within 1 - 1/e - epsilon of the optimum in expectation
_ROWS = 2048  # candidates evaluated at once


def flqmi(
    similarity: ArrayLike,
    k: int,
    eta: float = 1.0,
    optimizer: str = "lazy",
    rng: np.random.Generator | None = None,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Greedy maximisation of facility-location mutual information; the chosen indices and the gain of each step.

    f(A) = sum_q max(0, max_{a in A} S_aq) + eta sum_{a in A} max(0, max_q S_aq), similarities clamped at zero as in the
    published optimiser (USIM, section 3.3). "lazy" and "naive" give the same indices and gains; "stochastic" evaluates
    ceil(U / k ln(1 / 0.01)) random candidates per step and needs `rng`. Ties go to the lowest index.

    Shapes: similarity (U, Q) of candidates to queries -> (min(k, U),) and (min(k, U),).

    Raises:
        ValueError: similarities that are not a finite matrix, a negative eta, an unknown optimiser, or no rng for one.
    """
    matrix = np.ascontiguousarray(similarity, dtype=np.float32)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError("similarities must be a finite matrix of candidates and queries")
    if eta < 0:
        raise ValueError(f"eta must be zero or more, found {eta}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {optimizer!r}")
    if optimizer == "stochastic" and rng is None:
        raise ValueError("the stochastic optimiser needs a random generator")
    problem = _Coverage(matrix, eta)
    steps = min(k, len(matrix))
    if steps < 1:
        return np.empty(0, np.intp), np.empty(0)
    if optimizer == "lazy":
        return _lazy(problem, steps)
    return _sweep(problem, steps, rng if optimizer == "stochastic" else None)


class _Coverage:
    """Marginal gains of candidates, given how well each query is covered by now."""

    def __init__(self, matrix: NDArray[np.float32], eta: float) -> None:
        self.matrix = matrix
        self.covered = np.zeros(matrix.shape[1], np.float32)
        best = matrix.max(axis=1, initial=0.0)
        self.own = eta * best.astype(np.float64)

    def gains(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """sum_q max(0, S_aq - covered_q) + eta max(0, max_q S_aq) of `rows`."""
        found = np.empty(len(rows))
        for a in range(0, len(rows), _ROWS):
            part = rows[a : a + _ROWS]
            rise = self.matrix[part]
            rise -= self.covered
            np.maximum(rise, 0, out=rise)
            # In double precision each row is summed alike however many are evaluated together.
            found[a : a + _ROWS] = rise.astype(np.float64).sum(axis=1)
        result: NDArray[np.float64] = found + self.own[rows]
        return result

    def take(self, row: int) -> None:
        """Cover queries by `row`."""
        np.maximum(self.covered, self.matrix[row], out=self.covered)


def _lazy(problem: _Coverage, steps: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Gains only fall, so a gain of an earlier step is an upper bound; only the highest bounds are evaluated again."""
    bounds = problem.gains(np.arange(len(problem.matrix)))
    chosen, gains = np.empty(steps, np.intp), np.empty(steps)
    first_look = 1
    for step in range(steps):
        fresh = np.zeros(len(bounds), bool)
        batch, looked = first_look, 0
        while not fresh[best := int(bounds.argmax())]:
            stale = np.where(fresh, -np.inf, bounds)
            count = min(batch, len(bounds))
            rows = np.argpartition(-stale, count - 1)[:count] if count > 1 else np.array([best])
            rows = rows[stale[rows] > -np.inf]
            bounds[rows] = problem.gains(rows)
            fresh[rows] = True
            looked += len(rows)
            batch = min(max(16, looked // 2), _ROWS)
        first_look = max(1, looked // 2)  # what the last step needed tells where to start
        chosen[step], gains[step] = best, bounds[best]
        problem.take(best)
        bounds[best] = -np.inf
    return chosen, gains


def _sweep(
    problem: _Coverage, steps: int, rng: np.random.Generator | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Every remaining candidate evaluated at every step, or a random sample of them."""
    remaining = np.arange(len(problem.matrix))
    sample = math.ceil(len(remaining) / steps * math.log(1 / _EPSILON))
    chosen, gains = np.empty(steps, np.intp), np.empty(steps)
    for step in range(steps):
        rows = remaining
        if rng is not None and sample < len(remaining):
            rows = np.sort(rng.choice(remaining, sample, replace=False))
        values = problem.gains(rows)
        best = int(values.argmax())
        chosen[step], gains[step] = rows[best], values[best]
        problem.take(int(rows[best]))
        remaining = remaining[remaining != rows[best]]
    return chosen, gains
