# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Comparison of a run's methods: areas on every cost, efficiency, penalties, tests, ranks, tails."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eval.metrics.cost import COSTS
from eval.metrics.robustness import efficiency_interval, quantile_effects, rank_intervals, tail
from eval.metrics.significance import Test, holm_adjust, paired_p
from eval.metrics.study import aubc, foreground_efficiency, kendall, paired_wins, pairwise_penalty
from eval.protocol.guards import SEEDS_OF_A_CLAIM
from eval.reporting.summary import full_line, only_methods

TAILS = {"dice": 5, "hausdorff95": 95, "mean_surface_distance": 95}  # percentiles of the worst cases
_TESTS: tuple[Test, ...] = ("t", "wilcoxon", "permutation")


def complete(rounds: pd.DataFrame) -> pd.DataFrame:
    """Rounds of the seeds that every query method has finished, for pairing and ranking."""
    own = only_methods(rounds)
    lengths = own.groupby(["method", "seed"]).size().unstack(fill_value=0)
    seeds = lengths.columns[(lengths == lengths.to_numpy().max(initial=0)).all(axis=0)]
    result: pd.DataFrame = own[own["seed"].isin(seeds)].sort_values(["seed", "round"])
    return result


def scores_of(rounds: pd.DataFrame, value: str = "mean_dice") -> dict[str, NDArray[Any]]:
    """Values (seeds, budgets) of every method over its complete seeds."""
    return {
        str(method): own.pivot_table(index="seed", columns="round", values=value).to_numpy()
        for method, own in complete(rounds).groupby("method", sort=False)
    }


def areas(rounds: pd.DataFrame) -> pd.DataFrame:
    """Mean area of every method (rows) on equal steps and on the true axis of every cost (columns).

    On a cost, all curves are cut to the costs that all of them reached; NaN where there are none, or costs unknown.
    """
    table = complete(rounds)
    curves = dict(list(table.groupby(["method", "seed"], sort=False)))
    rows: dict[str, dict[str, float]] = {str(method): {} for method in table["method"].unique()}
    for cost in ("steps", *COSTS):
        limits = _limits(table, cost)
        for method, row in rows.items():
            own = [curve for (name, _), curve in curves.items() if name == method]
            row[cost] = float(np.mean([_area(curve, cost, limits) for curve in own])) if own else float("nan")
    result: pd.DataFrame = pd.DataFrame(rows).T.rename_axis("method").reset_index()
    return result


def efficiency(rounds: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """FG-Eff of every method: the published fit, the bounded fit and its interval over seeds.

    All methods share the start: the smallest foreground share and the mean Dice of the starting budgets. Empty without
    a full-data line, or where the start is not below it.
    """
    full, table = full_line(rounds, "mean_dice"), complete(rounds)
    columns = ["method", "fg_eff", "bounded", "low", "high"]
    if full is None or table.empty or table["round"].nunique() < 2:
        return pd.DataFrame(columns=columns)
    first = table[table["round"] == table["round"].min()]
    x0, y0 = float(table["foreground_fraction"].min()), float(first["mean_dice"].mean())
    if y0 >= full:
        return pd.DataFrame(columns=columns)
    rows = []
    for method, own in table.groupby("method", sort=False):
        seeds = [curve for _, curve in own.groupby("seed")]
        x, y = ([curve[name].to_numpy() for curve in seeds] for name in ("foreground_fraction", "mean_dice"))
        try:
            free = foreground_efficiency(np.concatenate(x), np.concatenate(y), full, x0, y0)
        except RuntimeError:  # the published fit has no bounds and may find no end
            free = float("nan")
        if len(seeds) > 1:
            bounded, low, high = efficiency_interval(x, y, full, rng, start_fraction=x0, start_dice=y0, samples=200)
        else:
            bounded = foreground_efficiency(x[0], y[0], full, x0, y0, bounded=True)
            low = high = float("nan")
        rows.append([method, free, bounded, low, high])
    return pd.DataFrame(rows, columns=columns)


def penalties(rounds: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """(matrix, tidy table of winner, loser, budget, p) over mean Dice; None with fewer than two complete seeds."""
    scores = scores_of(rounds)
    if len(scores) < 2 or next(iter(scores.values())).shape[0] < 2:
        return None
    return pairwise_penalty(scores), paired_wins(scores)


def ranks(rounds: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Ranks by area on equal steps with intervals; empty with fewer seeds than a claim needs."""
    scores = {method: [aubc(curve) for curve in curves] for method, curves in scores_of(rounds).items()}
    if len(scores) < 2 or len(next(iter(scores.values()))) < SEEDS_OF_A_CLAIM:
        return pd.DataFrame(columns=["method", "rank", "low", "high", "out_low", "out_high"])
    result: pd.DataFrame = rank_intervals(scores, rng).sort_values("rank", kind="stable").reset_index(drop=True)
    return result


def last_round(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows of the last round of every method and seed."""
    result: pd.DataFrame = cases[cases["round"] == cases.groupby(["method", "seed"])["round"].transform("max")]
    return result


def tails(cases: pd.DataFrame) -> pd.DataFrame:
    """5th percentile of Dice and 95th of distances over all cases, classes and seeds of the last round."""
    rows = [
        {
            "method": method,
            **{f"{name}_p{p}": tail(own[name].to_numpy(), p) for name, p in TAILS.items() if name in own},
        }
        for method, own in last_round(cases).groupby("method", sort=False)
    ]
    return pd.DataFrame(rows)


def significance(rounds: pd.DataFrame, cases: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Every pair of methods under three paired tests, two-sided: plain p and Holm's over all pairs of the same test.

    Two families: `pairs` of seeds by area on equal steps, and of test cases by Dice of the last round, which is the
    mean over classes and seeds. Columns pairs, first, second, n, difference (first - second), then p and holm of t,
    wilcoxon and permutation. Empty without two methods with two pairs.
    """
    parts = []
    for pairs, values in (("seeds, AUBC", _areas_by_seed(rounds)), ("cases, final Dice", _dices_by_case(cases))):
        names = list(values.columns)
        if len(names) < 2 or len(values) < 2:
            continue
        part = pd.DataFrame(list(itertools.combinations(names, 2)), columns=["first", "second"])
        columns = [(values[a].to_numpy(), values[b].to_numpy()) for a, b in part.to_numpy()]
        part.insert(0, "pairs", pairs)
        part["n"] = [int(np.count_nonzero(~np.isnan(a - b))) for a, b in columns]
        part["difference"] = [float(np.nanmean(a - b)) for a, b in columns]
        for test in _TESTS:
            part[f"p_{test}"] = [paired_p(a, b, test, rng=rng) for a, b in columns]
            part[f"holm_{test}"] = holm_adjust(part[f"p_{test}"].to_numpy())
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def effects(cases: pd.DataFrame, factors: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Quantile regression of the last round on factors that methods share; empty where it is not informative.

    `factors[name]` lists the methods with this factor. One row per measure: its quantile, the intercept (methods
    without factors) and the change with every factor, over cases, classes and seeds (Chlebus et al. 2022, Table 9).
    """
    last = last_round(only_methods(cases))
    marks = {name: last["method"].isin(list(methods)).astype(float) for name, methods in factors.items()}
    if last.empty or not marks:
        return pd.DataFrame()
    design = np.stack([np.ones(len(last)), *marks.values()], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return pd.DataFrame()
    rows = []
    for measure, percentile in TAILS.items():
        found = quantile_effects(last[measure].to_numpy(), marks, percentile / 100)
        rows.append({"measure": measure, "quantile": percentile / 100, **found})
    return pd.DataFrame(rows)


def between_settings(summaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tau-b of mean AUBC and of final Dice between every two settings, over the methods both have."""
    names, rows = list(summaries), []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = only_methods(summaries[first].merge(summaries[second], on="method"))
            if len(both) < 2:
                continue
            row: dict[str, object] = {"first": first, "second": second, "methods": len(both)}
            for metric in ("aubc", "final_dice"):
                row[f"tau_{metric}"], row[f"p_{metric}"] = kendall(both[f"{metric}_x"], both[f"{metric}_y"])
            rows.append(row)
    return pd.DataFrame(rows)


def _areas_by_seed(rounds: pd.DataFrame) -> pd.DataFrame:
    """Area on equal steps of every method (columns) and complete seed (rows)."""
    return pd.DataFrame({name: [aubc(curve) for curve in curves] for name, curves in scores_of(rounds).items()})


def _dices_by_case(cases: pd.DataFrame) -> pd.DataFrame:
    """Dice of every method (columns) and test case (rows) in the last round, over classes and then seeds."""
    last = last_round(only_methods(cases))
    by_seed = last.groupby(["method", "case", "seed"], sort=False)["dice"].mean()
    by_case = by_seed.groupby(["method", "case"], sort=False).mean().unstack("method")
    return by_case[list(last["method"].unique())] if len(last) else by_case


def _limits(table: pd.DataFrame, cost: str) -> tuple[float, float] | None:
    """Costs that every curve reached, or None."""
    if cost == "steps" or cost not in table or table[cost].isna().any():
        return None
    ends = table.groupby(["method", "seed"])[cost].agg(["min", "max"])
    low, high = float(ends["min"].max()), float(ends["max"].min())
    return (low, high) if low < high else None


def _area(curve: pd.DataFrame, cost: str, limits: tuple[float, float] | None) -> float:
    values = curve["mean_dice"].to_numpy()
    if cost == "steps":
        return aubc(values)
    if limits is None:
        return float("nan")
    costs = curve[cost].to_numpy(dtype=np.float64)
    rising = np.concatenate([[True], np.diff(costs) > 0])  # a round that cost nothing has the later value
    kept = np.concatenate([rising[1:], [True]])
    return aubc(values[kept], costs[kept], limits) if kept.sum() > 1 else float("nan")
