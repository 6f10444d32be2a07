# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The tables of a report beyond the summary: made once, shown in HTML, written as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.files import write_text
from eval.metrics.cost import TITLES
from eval.reporting import compare, literature
from eval.reporting.summary import summarise


@dataclass(frozen=True)
class Findings:
    """Tables by name, in the order of the report, and the penalty matrix where there is one."""

    tables: Mapping[str, pd.DataFrame]
    matrix: pd.DataFrame | None


@dataclass(frozen=True)
class Described:
    """Description of a study from its file; empty where only the tables of a run were kept."""

    about: str = ""
    published: str = ""
    factors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


HEADINGS = {
    "areas": "Area under the curve of mean Dice, on every cost",
    "efficiency": "Foreground efficiency",
    "ranks": "Ranks by area, with intervals over seeds",
    "penalties": "Wins at every budget",
    "significance": "Every pair of methods, three tests",
    "tails": "Worst cases of the last round",
    "effects": "What makes the worst cases better",
    "pseudo": "Quality of interpolated slices",
    "readers": "Agreement between annotators",
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
    "significance": "Paired, two-sided. Over seeds: area on equal steps; few seeds bound what the rank tests can show "
    "(three seeds: p is at least 0.25). Over test cases: Dice of the last round, mean over seeds and classes; says "
    "what these trainings do on other cases, not what another training would. Holm's p counts all pairs of one kind.",
    "tails": "5th percentile of Dice and 95th percentile of distances (mm) over cases, classes and seeds.",
    "effects": "Quantile regression of the last round's cases on what methods have in common: the quantile without "
    "any of it, and the change with each.",
    "pseudo": "Dice of the slices between annotated ones, interpolated by signed distance, against ground truth.",
    "readers": "Dice between two people's answers to the same regions, mean over the regions that show the class.",
    "published": "Networks, hardware and test cases differ from the paper's: compare orders, not values.",
}
COLUMNS = {
    "steps": "equal steps",
    "fg_eff": "as published",
    "bounded": "bounded fit",
    "low": "95 % from",
    "high": "to",
    "out_low": "one seed out, from",
    "out_high": "to ",
    "p_t": "t-test p",
    "p_wilcoxon": "Wilcoxon p",
    "p_permutation": "permutation p",
    "holm_t": "t-test, Holm",
    "holm_wilcoxon": "Wilcoxon, Holm",
    "holm_permutation": "permutation, Holm",
    "dice_p5": "Dice, 5th percentile",
    "hausdorff95_p95": "HD95, 95th (mm)",
    "mean_surface_distance_p95": "mean surface distance, 95th (mm)",
    "published_sd": "± published",
    "tau_b": "tau-b",
    "tau_aubc": "tau-b of AUBC",
    "tau_final_dice": "tau-b of final Dice",
    "p_aubc": "p (AUBC)",
    "p_final_dice": "p (final Dice)",
}


def find(
    rounds: pd.DataFrame,
    cases: pd.DataFrame,
    study: Described,
    others: Mapping[str, pd.DataFrame] | None = None,
    pseudo: pd.DataFrame | None = None,
    readers: pd.DataFrame | None = None,
) -> Findings:
    """Every table that the finished rounds allow; `others` holds rounds of other runs.

    `pseudo` and `readers` are finished tables.
    """
    rng = np.random.default_rng(0)
    summary = summarise(rounds)
    fits = compare.efficiency(rounds, rng)
    beaten = compare.penalties(rounds)
    theirs, agreement = literature.beside(study.published, literature.Numbers(summary, fits, rounds, cases))
    tables = {
        "areas": compare.areas(rounds).rename(columns=TITLES),
        "efficiency": fits,
        "ranks": compare.ranks(rounds, rng),
        "significance": compare.significance(rounds, cases, rng),
        "penalties": beaten[1] if beaten else pd.DataFrame(),
        "tails": compare.tails(cases),
        "effects": compare.effects(cases, study.factors),
        "pseudo": pd.DataFrame() if pseudo is None else pseudo,
        "readers": pd.DataFrame() if readers is None else readers,
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
    """The table as text for HTML, heading first: as many decimals as a column needs, nothing where not defined."""
    columns = [_column(str(name), table.iloc[:, i]) for i, name in enumerate(table.columns)]
    heading = [COLUMNS.get(str(name), str(name)) for name in table.columns]
    return [heading, *map(list, zip(*columns, strict=True))]


def _column(name: str, values: pd.Series) -> list[str]:
    if not pd.api.types.is_float_dtype(values):
        return [str(value) for value in values]
    if name == "p" or name.startswith(("p_", "holm_")):
        return ["" if np.isnan(v) else "< 0.001" if v < 0.001 else f"{v:.3f}" for v in values]
    largest = float(values.abs().max())
    decimals = 4 if largest < 2 else 2 if largest < 1000 else 0
    return ["" if np.isnan(v) else f"{v:,.{decimals}f}" for v in values]


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")
