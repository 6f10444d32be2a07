# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Measures of a whole study: speed of learning, pairwise comparison of methods, and agreement of rankings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import kendalltau

from eval.metrics.significance import Test, holm_adjust, paired_p


class Kendall(NamedTuple):
    """Rank correlation and its two-sided p value."""

    tau: float
    p: float


def aubc(values: ArrayLike, cost: ArrayLike | None = None, limits: tuple[float, float] | None = None) -> float:
    """Area under the budget curve, in the unit of `values` (L,).

    Equal steps, as published: sum_i (y_i + y_{i+1}) / 2 / (L - 1). With `cost` (L,), strictly increasing, on the true
    axis: trapezoids over cost / (cost_last - cost_first). A single value is its own area (nnActive, section 8).
    `limits` (low, high) of the cost axis cut the curve, straight between its points, so that methods which spent
    different amounts are compared over the costs that all of them reached.

    Raises:
        ValueError: no value, another number of costs, costs that do not increase, or limits outside of them.
    """
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 1 or y.size == 0:
        raise ValueError(f"a budget curve needs at least one value on one axis, found shape {y.shape}")
    x = np.arange(y.size, dtype=np.float64) if cost is None else np.asarray(cost, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{y.size} values need as many costs, found {x.size}")
    if y.size == 1:
        return float(y[0])
    if not np.all(np.diff(x) > 0):
        raise ValueError(f"costs must increase from round to round, found {x.tolist()}")
    if limits is not None:
        if not x[0] <= limits[0] < limits[1] <= x[-1]:
            raise ValueError(f"limits {limits} must be increasing and within the costs {x[0]:g} to {x[-1]:g}")
        cut = np.array([limits[0], *x[(x > limits[0]) & (x < limits[1])], limits[1]])
        x, y = cut, np.interp(cut, x, y)
    steps = np.diff(x)
    return float(np.sum((y[1:] + y[:-1]) / 2 * steps) / (x[-1] - x[0]))


def foreground_efficiency(
    fractions: ArrayLike,
    dices: ArrayLike,
    full_dice: float,
    start_fraction: float | None = None,
    start_dice: float | None = None,
    *,
    bounded: bool = False,
) -> float:
    """FG-Eff gamma of y = c - a exp(-gamma (x - x0)) by least squares (nnActive, section 8).

    `fractions` (N,) are labelled foreground voxels over all foreground voxels of the pool, `dices` (N,) the mean Dice
    there, of all seeds and rounds of one method.
    `c` is `full_dice`, of the same recipe on all labels; x0 is `start_fraction` (default: the smallest fraction);
    a = c - `start_dice` (default: mean Dice at x0). All methods of a setting share x0 and a.
    `bounded` keeps gamma within [0, 10^6], where the published fit is free.

    Raises:
        ValueError: lists of different lengths, fewer than two points, or a start that is not below the full Dice.
    """
    x, y = np.asarray(fractions, dtype=np.float64), np.asarray(dices, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size < 2:
        raise ValueError(f"an efficiency needs two or more (fraction, Dice) pairs, found {x.shape} and {y.shape}")
    x0 = float(x.min()) if start_fraction is None else start_fraction
    a = full_dice - (float(y[x == x.min()].mean()) if start_dice is None else start_dice)
    if a <= 0:
        raise ValueError(
            f"the start (Dice {full_dice - a:.3f}) is not below the full-data Dice {full_dice:.3f}; no fit"
        )

    def curve(t: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
        result: NDArray[np.float64] = full_dice - a * np.exp(-gamma * (t - x0))
        return result

    limits = {"bounds": (0.0, 1e6)} if bounded else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # says that the covariance, which is not used, is unknown
        best, _ = curve_fit(curve, x, y, p0=[1.0], maxfev=10_000, **limits)
    return float(best[0])


def paired_wins(
    scores: Mapping[str, ArrayLike],
    alpha: float = 0.05,
    *,
    holm: bool = False,
    test: Test = "t",
    rng: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Significant differences as a tidy table with columns winner, loser, budget, p.

    `scores[method]` is (seeds, budgets), rows of all methods being the same seeds. For every budget and pair: paired
    two-sided `test` over seeds (see `paired_p`; published: the t-test); the method with the larger mean wins when
    p < alpha. `holm` corrects over all pairs and budgets together (nnActive, section 8).

    Raises:
        ValueError: methods with different seeds or budgets, or fewer than two seeds.
    """
    names = list(scores)
    values = {name: np.atleast_2d(np.asarray(scores[name], dtype=np.float64)) for name in names}
    shapes = {array.shape for array in values.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] < 2:
        raise ValueError(f"paired tests need the same seeds (two or more) and budgets of every method, found {shapes}")
    rows = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for budget in range(next(iter(shapes))[1]):
                z = values[first][:, budget] - values[second][:, budget]
                winner, loser = (first, second) if z.mean() > 0 else (second, first)
                p = paired_p(z, np.zeros_like(z), test, rng=rng)
                rows.append({"winner": winner, "loser": loser, "budget": budget, "p": p})
    table = pd.DataFrame(rows, columns=["winner", "loser", "budget", "p"])
    if holm:
        table["p"] = holm_adjust(table["p"].to_numpy())
    result: pd.DataFrame = table[table["p"] < alpha].reset_index(drop=True)
    return result


def pairwise_penalty(
    scores: Mapping[str, ArrayLike],
    alpha: float = 0.05,
    *,
    holm: bool = False,
    test: Test = "t",
    rng: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Penalty matrix: share of budgets at which the row's method beats the column's, in 0..1 (nnActive, section 8).

    Arguments and errors as of `paired_wins`.
    """
    names = list(scores)
    budgets = np.atleast_2d(np.asarray(scores[names[0]])).shape[1]
    matrix = pd.DataFrame(0.0, index=names, columns=names)
    for winner, loser in paired_wins(scores, alpha, holm=holm, test=test, rng=rng)[["winner", "loser"]].itertuples(
        index=False
    ):
        matrix.loc[winner, loser] += 1 / budgets
    return matrix


def mean_ranks(scores: pd.DataFrame, decimals: int | None = None) -> pd.Series:
    """Mean rank of every method (column) over settings (rows); 1 is best, ties share the better rank.

    `decimals` rounds first, as the published figures do. Settings where a method has no score are left out for it.
    """
    table = scores if decimals is None else scores.round(decimals)
    result: pd.Series = table.rank(axis=1, ascending=False, method="min").mean(axis=0)
    return result


def kendall(first: ArrayLike, second: ArrayLike) -> Kendall:
    """Kendall's tau-b between two score vectors, with its two-sided p value.

    Raises:
        ValueError: vectors of different lengths or shorter than two.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise ValueError(f"rank correlation needs two equally long vectors, found {a.shape} and {b.shape}")
    tau, p = kendalltau(a, b, variant="b")
    return Kendall(float(tau), float(p))
