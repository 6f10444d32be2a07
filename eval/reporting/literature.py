# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A run beside the published numbers of the same setting: read, measured the same way, and ranked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from eval.metrics.robustness import tail
from eval.metrics.study import kendall
from eval.protocol.study import FULL_DATA
from eval.reporting.summary import full_line, only_methods

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
_REACHED = 0.99  # share of the full-data Dice that counts as reached
_METRIC = re.compile(
    r"(?P<when>final|cycles|round(?P<round>\d+))_(?P<measure>[a-z0-9_]+?)(?:_p(?P<percentile>\d+))?(?::(?P<class>.+))?"
)


class Numbers(NamedTuple):
    """Measurements of a run: tables of `eval.reporting.summary`, `eval.reporting.compare` and its folder."""

    summary: pd.DataFrame
    fits: pd.DataFrame
    rounds: pd.DataFrame
    cases: pd.DataFrame


def settings() -> list[str]:
    """Every setting `paper/dataset/regime` with published numbers."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(PUBLISHED.glob("*.csv"))}
    return sorted({f"{name}/{d}/{r}" for name, t in tables.items() for d, r in t[["dataset", "regime"]].to_numpy()})


def read_published(setting: str) -> pd.DataFrame:
    """Rows of a setting `paper/dataset/regime`; empty where there is none."""
    paper, _, rest = setting.partition("/")
    dataset, _, regime = rest.partition("/")
    path = PUBLISHED / f"{paper}.csv"
    if not setting or not path.is_file():
        return pd.DataFrame(columns=["paper", "table", "dataset", "regime", "method", "metric", "mean", "sd"])
    table = pd.read_csv(path)
    result: pd.DataFrame = table[(table["dataset"] == dataset) & (table["regime"] == regime)].reset_index(drop=True)
    return result


def beside(setting: str, numbers: Numbers) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(ours beside theirs, rank correlation of every metric) for a setting; empty without published numbers.

    Rows hold metric, method, published, published_sd, ours; tau-b is over the methods that both have.
    """
    table = read_published(setting)
    own = measured(list(dict.fromkeys(table["metric"])), numbers)
    both = table.merge(own, on=["metric", "method"])
    both = both.rename(columns={"mean": "published", "sd": "published_sd"})
    both = both[["metric", "method", "published", "published_sd", "ours"]]
    taus = []
    for metric, rows in only_methods(both).groupby("metric", sort=False):
        if len(rows) > 1:
            tau, p = kendall(rows["published"], rows["ours"])
            taus.append({"metric": metric, "methods": len(rows), "tau_b": tau, "p": p})
    return both, pd.DataFrame(taus)


def measured(metrics: Iterable[str], numbers: Numbers) -> pd.DataFrame:
    """The run's own values of published metrics (see `eval/published/README.md`): columns metric, method, ours.

    Metrics that the run does not have, and undefined values, are left out.
    """
    parts = [_values(metric, numbers).rename("ours").rename_axis("method").reset_index() for metric in metrics]
    named = [part.assign(metric=metric) for metric, part in zip(metrics, parts, strict=True)]
    found = pd.concat(named) if named else pd.DataFrame(columns=["metric", "method", "ours"])
    result: pd.DataFrame = found[found["ours"].notna()].reset_index(drop=True)[["metric", "method", "ours"]]
    return result


def _values(metric: str, numbers: Numbers) -> pd.Series:
    """A metric by method."""
    for table in (numbers.summary, numbers.fits):
        if metric in table:
            result: pd.Series = table.set_index("method")[metric].astype(float)
            return result
    if metric == "share_for_full":
        return share_for_full(numbers.rounds)
    match = _METRIC.fullmatch(metric)
    if match is None or match["measure"] not in numbers.cases:
        return pd.Series(dtype=float)
    rows = _rounds_meant(numbers.cases, match)
    if match["class"]:
        rows = rows[rows["class"] == match["class"]]
    if rows.empty:
        return pd.Series(dtype=float)
    values = rows.rename(columns={match["measure"]: "value"})
    if match["percentile"]:
        result = values.groupby("method")["value"].agg(lambda found: tail(found, float(match["percentile"])))
        return result
    by_class = values.groupby(["method", "seed", "round", "class"])["value"].mean()  # as the mean Dice of a round
    result = by_class.groupby(["method", "seed", "round"]).mean().groupby("method").mean()
    return result


def _rounds_meant(cases: pd.DataFrame, match: re.Match[str]) -> pd.DataFrame:
    if match["when"] == "cycles":
        meant = cases["round"] > 0
    elif match["when"] == "final":
        last = cases.groupby(["method", "seed"])["round"].transform("max")
        own = only_methods(cases)["round"].max()
        meant = (cases["round"] == last) & ((last == own) | (cases["method"] == FULL_DATA))
    else:
        meant = (cases["round"] == int(match["round"])) & (cases["method"] != FULL_DATA)
    result: pd.DataFrame = cases[meant]
    return result


def share_for_full(rounds: pd.DataFrame) -> pd.Series:
    """Share of the pool's voxels annotated when the mean curve first comes within 1 % of the full-data Dice.

    NaN for a method that does not; empty without a full-data line.
    """
    full, pool = full_line(rounds, "mean_dice"), full_line(rounds, "voxels")
    if full is None or pool is None:
        return pd.Series(dtype=float)
    shares = {}
    for method, own in only_methods(rounds).groupby("method", sort=False):
        mean = own.groupby("round")[["mean_dice", "voxels"]].mean()
        reached = mean[mean["mean_dice"] >= _REACHED * full]
        shares[str(method)] = float(reached["voxels"].iloc[0] / pool) if len(reached) else np.nan
    return pd.Series(shares, dtype=float)
