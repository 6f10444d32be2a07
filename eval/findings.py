# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The tables of a report beyond the summary: made once, shown in HTML, written as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from eval import compare
from eval.files import write_text
from eval.metrics.cost import TITLES
from eval.summary import summarise


@dataclass(frozen=True)
class Findings:
    """Tables by name, in the order of the report, and the penalty matrix where there is one."""

    tables: Mapping[str, pd.DataFrame]
    matrix: pd.DataFrame | None


HEADINGS = {
    "areas": "Area under the curve of mean Dice, on every cost",
    "efficiency": "Foreground efficiency",
    "ranks": "Ranks by area, with intervals over seeds",
    "penalties": "Significant differences",
    "tails": "Worst cases of the last round",
    "published": "Beside the published numbers",
    "agreement": "Rank correlation with the published numbers",
    "settings": "Rank correlation with other settings",
}
NOTES = {
    "areas": "Every curve is cut to the costs that all methods reached; empty where a cost was not recorded. "
    "Minutes are a linear model of regions, slices and border unless the server's ledger recorded them.",
    "efficiency": "Rate at which Dice approaches the full-data line per share of foreground: the published fit, and a "
    "fit within bounds with a 95 % interval from drawing seeds.",
    "ranks": "95 % interval from drawing seeds with replacement; smallest and largest rank when one seed is left out.",
    "penalties": "Paired t-test over seeds at every budget, 5 %, not corrected for the number of tests.",
    "tails": "5th percentile of Dice and 95th percentile of distances (mm) over cases, classes and seeds.",
    "published": "Networks, hardware and test cases differ from the paper's: compare orders, not values.",
}


def find(
    rounds: pd.DataFrame, cases: pd.DataFrame, setting: str, others: Mapping[str, pd.DataFrame] | None = None
) -> Findings:
    """Every table that the finished rounds allow; `setting` names published numbers, `others` rounds of other runs."""
    rng = np.random.default_rng(0)
    summary = summarise(rounds)
    fits = compare.efficiency(rounds, rng)
    beaten = compare.penalties(rounds)
    theirs, agreement = compare.published(setting, summary, fits)
    tables = {
        "areas": compare.areas(rounds).rename(columns=TITLES),
        "efficiency": fits,
        "ranks": compare.ranks(rounds, rng),
        "penalties": beaten[1] if beaten else pd.DataFrame(),
        "tails": compare.tails(cases),
        "published": theirs,
        "agreement": agreement,
        "settings": compare.between_settings({name: summarise(table) for name, table in (others or {}).items()}),
    }
    shown = {name: table for name, table in tables.items() if not table.empty}
    return Findings(shown, beaten[0] if beaten else None)


def write_findings(folder: Path, findings: Findings, summary: pd.DataFrame) -> None:
    """Write every table, the summary and the penalty matrix into `folder` as CSV and as LaTeX."""
    tables = {"summary": summary, **findings.tables}
    if findings.matrix is not None:
        tables["penalty_matrix"] = findings.matrix.rename_axis("method").reset_index()
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
        plain = table.rename(columns=_escaped)
        text = plain.map(lambda value: _escaped(value) if isinstance(value, str) else value)
        write_text(folder / f"{name}.tex", text.to_latex(index=False, float_format="%.4g", na_rep="--"))


def cells(table: pd.DataFrame) -> list[list[str]]:
    """The table as text for HTML, heading first: four digits, nothing where a value is not defined."""
    return [[str(name) for name in table.columns], *([_text(v) for v in row] for row in table.itertuples(index=False))]


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")
