# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Summary of a run: one line per method, from rounds.csv alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eval.metrics.study import aubc
from eval.protocol.study import FULL_DATA

COSTS = ("regions", "voxels", "foreground_voxels")


def summarise(rounds: pd.DataFrame) -> pd.DataFrame:
    """One row per method: seeds, rounds, AUBC and final values as mean and sample standard deviation over seeds.

    Only seeds with as many rounds as the longest are counted, as in the nnActive study; the area is over equal steps.
    The full-data line comes last and has no area.
    """
    longest = rounds.groupby(["method", "seed"])["round"].transform("count").max()
    rows = []
    for method in sorted(rounds["method"].unique(), key=lambda name: name == FULL_DATA):
        full = method == FULL_DATA
        curves = [
            curve.sort_values("round")
            for _, curve in rounds[rounds["method"] == method].groupby("seed")
            if full or len(curve) == longest
        ]
        if not curves:
            continue
        final = pd.DataFrame([curve.iloc[-1] for curve in curves])
        row: dict[str, object] = {"method": method, "seeds": len(curves), "rounds": len(curves[0])}
        areas = [float("nan") if full else aubc(curve["mean_dice"].to_numpy()) for curve in curves]
        measures = {"aubc": areas, "final_dice": final["mean_dice"], "final_hd95": final["mean_hd95"]}
        for name, values in measures.items():
            numbers = np.asarray(values, dtype=np.float64)
            row[name] = float(numbers.mean())
            row[f"{name}_sd"] = float(numbers.std(ddof=1)) if numbers.size > 1 else float("nan")
        for cost in (*COSTS, "foreground_fraction"):
            row[cost] = float(final[cost].astype(float).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def only_methods(rounds: pd.DataFrame) -> pd.DataFrame:
    """The rows of query methods, which can be ranked and compared; the full-data line is neither."""
    result: pd.DataFrame = rounds[rounds["method"] != FULL_DATA]
    return result


def full_line(rounds: pd.DataFrame, value: str) -> float | None:
    """Mean over seeds of the full-data line, or None where the study has none."""
    values = rounds.loc[rounds["method"] == FULL_DATA, value]
    return float(values.mean()) if len(values) else None


def mean_curves(rounds: pd.DataFrame, value: str, cost: str) -> dict[str, pd.DataFrame]:
    """For every method a table (cost, mean, sd) by round: mean and sample standard deviation over seeds."""
    curves = {}
    for method in only_methods(rounds)["method"].unique():
        by_round = rounds[rounds["method"] == method].groupby("round")
        columns = {"cost": by_round[cost].mean(), "mean": by_round[value].mean(), "sd": by_round[value].std(ddof=1)}
        curves[str(method)] = pd.DataFrame(columns)
    return curves


def seconds(rounds: pd.DataFrame) -> pd.DataFrame:
    """Seconds of every step in a run's mean round, one row per method."""
    steps = [name for name in rounds.columns if name.endswith("_s")]
    result: pd.DataFrame = rounds.groupby("method", sort=False)[steps].mean().reset_index()
    return result


def plain_table(summary: pd.DataFrame) -> str:
    """The summary for a terminal."""
    columns = ["method", "seeds", "AUBC", "final Dice", "HD95 mm", "regions", "voxels", "FG voxels", "FG share"]
    lines = [columns]
    for row in summary.to_dict("records"):
        cells = [str(row["method"]), str(row["seeds"])]
        cells += [with_sd(row[n], row[f"{n}_sd"], d) for n, d in (("aubc", 4), ("final_dice", 4), ("final_hd95", 2))]
        cells += [f"{row[cost]:,.0f}" for cost in COSTS]
        lines.append([*cells, f"{100 * row['foreground_fraction']:.1f} %"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def with_sd(mean: float, sd: float, decimals: int) -> str:
    """`mean` alone, or `mean ± sd` for more than one seed; empty for an undefined value."""
    if np.isnan(mean):
        return ""
    text = f"{mean:.{decimals}f}"
    return text if np.isnan(sd) else f"{text} ± {sd:.{decimals}f}"
