# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Robustness of a result: tails over cases, intervals over seeds, stable ranks, quantile effects, pseudo labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import QuantileRegressor

from eval.metrics.segmentation import dice
from eval.metrics.study import foreground_efficiency, mean_ranks


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


def tail(values: ArrayLike, percentile: float) -> float:
    """Percentile over the defined cases, linear between them: 5 for Dice, 95 for distances (Chlebus et al. 2022).

    NaN without a defined case.
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    return float(np.percentile(numbers, percentile)) if numbers.size else float("nan")


def efficiency_interval(
    fractions: Sequence[ArrayLike],
    dices: Sequence[ArrayLike],
    full_dice: float,
    rng: np.random.Generator,
    *,
    start_fraction: float | None = None,
    start_dice: float | None = None,
    samples: int = 500,
    level: float = 0.95,
) -> Interval:
    """Bounded foreground efficiency with a percentile interval from drawing seeds with replacement.

    `fractions[s]` and `dices[s]` (L,) are the curve of seed s; the rest is as in `foreground_efficiency`.

    Raises:
        ValueError: fewer than two seeds, or curves that `foreground_efficiency` refuses.
    """
    x, y = ([np.asarray(curve, dtype=np.float64) for curve in curves] for curves in (fractions, dices))
    if len(x) < 2:
        raise ValueError(f"an interval over seeds needs two or more of them, found {len(x)}")
    x0 = min(float(curve.min()) for curve in x) if start_fraction is None else start_fraction
    start = float(np.mean([curve[0] for curve in y])) if start_dice is None else start_dice

    @cache  # few seeds have few distinct draws, and the fit is the expensive step
    def fit(drawn: tuple[int, ...]) -> float:
        reached, found = (np.concatenate([curves[i] for i in drawn]) for curves in (x, y))
        return foreground_efficiency(reached, found, full_dice, start_fraction=x0, start_dice=start, bounded=True)

    found = [fit(tuple(sorted(rng.integers(len(x), size=len(x)).tolist()))) for _ in range(samples)]
    low, high = np.percentile(found, [50 * (1 - level), 50 * (1 + level)])
    return Interval(fit(tuple(range(len(x)))), float(low), float(high))


def rank_intervals(
    scores: Mapping[str, ArrayLike], rng: np.random.Generator, *, samples: int = 2000, level: float = 0.95
) -> pd.DataFrame:
    """Rank of every method by its mean over seeds (1 is best), with a percentile interval from drawing seeds.

    `scores[method]` is (seeds,) or (seeds, settings); settings are ranked apart and their ranks averaged. Columns
    method, rank, low, high, and `out_low`, `out_high`: smallest and largest rank when one seed is left out.

    Raises:
        ValueError: methods with different seeds, or fewer than three seeds.
    """
    names = list(scores)
    arrays = [np.asarray(scores[name], dtype=np.float64) for name in names]
    stack = (
        np.stack([a[:, None] if a.ndim == 1 else a for a in arrays]) if len({a.shape for a in arrays}) == 1 else None
    )
    if stack is None or stack.shape[1] < 3:
        raise ValueError("rank intervals need the same three or more seeds of every method")
    seeds = stack.shape[1]

    def ranks(chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        means = pd.DataFrame(stack[:, chosen].mean(axis=1).T, columns=names)
        return mean_ranks(means).to_numpy()

    drawn = np.stack([ranks(rng.integers(seeds, size=seeds)) for _ in range(samples)])
    without = np.stack([ranks(np.delete(np.arange(seeds), i)) for i in range(seeds)])
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)], axis=0)
    columns = {"method": names, "rank": ranks(np.arange(seeds)), "low": low, "high": high}
    return pd.DataFrame({**columns, "out_low": without.min(axis=0), "out_high": without.max(axis=0)})


def quantile_effects(values: ArrayLike, factors: Mapping[str, ArrayLike], quantile: float) -> dict[str, float]:
    """Quantile regression values ~ 1 + factors at `quantile`: the intercept and the effect of every factor.

    Minimises the pinball loss sum_i rho_q(y_i - b0 - sum_k b_k x_ik) without a penalty (Chlebus et al. 2022 take
    q = 0.05 for Dice and 0.95 for distances, with factors such as `uncertainty` and `slice` of 0 or 1). Undefined
    values are left out.

    Raises:
        ValueError: a factor of another length, or a quantile that is not between 0 and 1.
    """
    y = np.asarray(values, dtype=np.float64)
    columns = [np.asarray(factor, dtype=np.float64) for factor in factors.values()]
    if any(column.shape != y.shape for column in columns) or not columns:
        raise ValueError(f"every factor needs one number a value ({y.size}), and there must be a factor")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} must lie between 0 and 1")
    kept = ~np.isnan(y)
    model = QuantileRegressor(quantile=quantile, alpha=0.0, solver="highs")
    model.fit(np.stack(columns, axis=1)[kept], y[kept])
    return {"intercept": float(model.intercept_), **dict(zip(factors, map(float, model.coef_), strict=True))}


def interpolation_quality(pseudo_nxy: ArrayLike, truth_nxy: ArrayLike, classes: Mapping[str, int]) -> dict[str, float]:
    """Mean Dice of the pseudo-labelled slices against the truth of the same slices, for every class.

    Slice i of both lies i + 1 slices from the top one; a class absent from both in a slice is not counted there
    (Burmeister et al. 2022, Table 10, with slices compared in the same order).

    Raises:
        ValueError: stacks of different shapes.
    """
    pseudo, truth = np.asarray(pseudo_nxy), np.asarray(truth_nxy)
    if pseudo.shape != truth.shape:
        raise ValueError(f"pseudo labels have shape {pseudo.shape} but truth {truth.shape}; compare the same slices")
    quality = {}
    for name, value in classes.items():
        found = [dice(p == value, t == value) for p, t in zip(pseudo, truth, strict=True)]
        defined = [d for d in found if not np.isnan(d)]
        quality[name] = float(np.mean(defined)) if defined else float("nan")
    return quality
