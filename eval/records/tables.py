# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The tables of a run's folder: rounds.csv, cases.csv and queries.csv, rebuilt from the cells' finished steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eval.errors import RefereeError
from eval.files import read_json, write_text
from eval.protocol.guards import steps_of
from eval.protocol.study import FULL_DATA, Study
from eval.records.rows import query_row, round_row
from eval.records.state import STEPS

FILES = ("rounds", "cases", "queries")


def write_tables(study: Study, out: Path) -> None:
    """Write the three CSV files from the finished steps of all cells; rounds without a test are not in rounds.csv."""
    for name, table in zip(FILES, build_tables(study, out), strict=True):
        write_text(out / f"{name}.csv", table.to_csv(index=False))


def build_tables(study: Study, out: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(rounds, cases, queries) of a run's folder, in the order of the study's methods and seeds."""
    data = read_json(out / "manifest.json")["data"]
    classes = [name for name, value in data["labels"].items() if value != 0]
    pool_foreground = sum(data["pool"]["classes"][name] for name in classes)
    rounds: list[dict[str, Any]] = []
    cases: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    for method, seed, steps in steps_of(study, out):
        asked: list[dict[str, Any]] = []
        for round_ in range(study.rounds):
            key = {"method": method, "seed": seed, "round": round_}
            if f"{round_}.query" not in steps:
                break
            new = _timed(steps[f"{round_}.query"]["regions"], steps.get(f"{round_}.annotate"))
            asked += new
            if method != FULL_DATA:
                queries += [{**key, **query_row(region, classes)} for region in new]
            if f"{round_}.test" in steps:
                tested = steps[f"{round_}.test"]["rows"]
                seconds = {f"{step}_s": steps[f"{round_}.{step}"]["seconds"] for step in STEPS}
                if steps[f"{round_}.train"].get("shared"):
                    seconds["train_s"] = None  # another method's cell did the work
                rounds.append({**key, **round_row(asked, tested, classes, pool_foreground), **seconds})
                cases += [{**key, **row} for row in tested]
    return pd.DataFrame(rounds), pd.DataFrame(cases), pd.DataFrame(queries)


def read_table(out: Path, name: str, *, required: bool = True) -> pd.DataFrame:
    """One table of a run's folder; without `required` an empty one where nothing was written.

    Raises:
        RefereeError: it is missing or has no row yet.
    """
    path = out / f"{name}.csv"
    if not path.is_file() or path.stat().st_size < 2:
        if not required:
            return pd.DataFrame()
        raise RefereeError(f"{path} has no finished round yet; run or resume the study first")
    return pd.read_csv(path)


def _timed(regions: list[dict[str, Any]], annotated: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Regions with the minutes that the server recorded, where it did for all of them."""
    minutes = [((annotated or {}).get("minutes") or {}).get(str(region["query"])) for region in regions]
    if any(m is None for m in minutes):
        return regions
    return [{**r, "costs": {**r["costs"], "minutes": m}} for r, m in zip(regions, minutes, strict=True)]
