# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The report of a run: one self-contained HTML file, a PNG of the learning curves, a table for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape
from numpy.typing import NDArray

from eval.errors import RefereeError
from eval.files import read_json, write_bytes, write_text
from eval.metrics.cost import COSTS
from eval.protocol.dataset import Dataset, read_dataset
from eval.protocol.guards import check_cells, check_same_origin, check_seeds, steps_of
from eval.protocol.study import FULL_DATA, Study, load_study
from eval.protocol.volumes import read_volume
from eval.records.tables import read_table
from eval.reporting.deidentify import (
    FOLDER,
    Hidden,
    check_without_ids,
    hidden_of,
    manifest_without_ids,
    write_tables_without_ids,
)
from eval.reporting.figures import Picture, learning_curves, penalty_matrix, region_pictures, to_png, to_svg
from eval.reporting.pseudo_label_quality import pseudo_quality
from eval.reporting.query_reasons import reasons_of
from eval.reporting.report_tables import HEADINGS, NOTES, Described, cells, find, write_findings
from eval.reporting.summary import COSTS as SUMMED
from eval.reporting.summary import only_methods, plain_table, seconds, summarise, with_sd

_SHARE = "share of the foreground annotated"
_LONG = 25  # rows of a table that is folded away
_PICTURES = 4  # regions drawn of every method


def write_report(
    folder: Path,
    *,
    pictures: bool = True,
    others: Mapping[str, pd.DataFrame] | None = None,
    deidentify: bool = False,
) -> Path:
    """Write report.html, learning_curves.png, plots/ and tables/ into a run's folder and give the report's path.

    `others` holds the rounds of the runs reported together, this one included, for correlations between settings. With
    `deidentify` all of it, and the run's tables, go into a folder of their own that may be handed on.

    Raises:
        RefereeError: no run in the folder, or no finished round yet.
    """
    if deidentify:
        study = _study_of(folder)
        hidden = hidden_of(folder, *([str(study.data)] if study else []))
        out = folder / FOLDER
        write_tables_without_ids(folder, out, hidden)
        path = _write(folder, out, pictures, others, hidden)
        check_without_ids(out, hidden)
        return path
    return _write(folder, folder, pictures, others, None)


def _write(
    folder: Path, out: Path, pictures: bool, others: Mapping[str, pd.DataFrame] | None, hidden: Hidden | None
) -> Path:
    """Read the run in `folder` and write its report into `out`."""
    rounds, queries = read_table(folder, "rounds"), read_table(folder, "queries", required=False)
    manifest = _manifest(folder)
    classes = [name for name, value in manifest["data"]["labels"].items() if value != 0]
    curves = learning_curves(rounds, ["mean_dice"], ["regions", "foreground_voxels"])
    write_bytes(out / "learning_curves.png", to_png(curves))
    per_class = {f"dice_{name}": f"Dice of {name}" for name in classes}
    name = hidden.name if hidden else str
    shown = _pictures(folder, queries, name) if pictures else {}
    study = _study_of(folder)
    cases, pseudo, readers = read_table(folder, "cases"), _pseudo(study, queries), _readers(study, folder)
    findings = find(rounds, cases, _described(study), others, pseudo, readers)
    write_findings(out / "tables", findings, summarise(rounds))
    known = [c for c in COSTS if c in rounds and rounds[c].notna().all() and c not in ("regions", "foreground_voxels")]
    charts = {
        "costs": learning_curves(rounds, ["mean_dice"], known) if known else None,
        "share": learning_curves(rounds, ["foreground_fraction"], ["regions"], {"foreground_fraction": _SHARE}),
        "penalty": penalty_matrix(findings.matrix) if findings.matrix is not None else None,
        "per_class": learning_curves(rounds, list(per_class), ["regions"], per_class),
        "distance": learning_curves(rounds, ["mean_hd95"], ["regions"]),
    }
    drawn = {name: figure for name, figure in charts.items() if figure}
    for chart, figure in drawn.items():
        write_bytes(out / "plots" / f"{chart}.png", to_png(figure))
    environment = Environment(
        loader=PackageLoader("eval.reporting"), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        manifest=manifest_without_ids(manifest, hidden) if hidden else manifest,
        about=_about(study, hidden),
        drawn={chart: _inline(to_svg(figure), "image/svg+xml") for chart, figure in drawn.items()},
        findings=[
            {"id": n, "heading": HEADINGS[n], "note": NOTES.get(n, ""), "rows": cells(t), "folded": len(t) > _LONG}
            for n, t in findings.tables.items()
        ],
        finished=_finished(rounds, manifest),
        table=_summary_rows(rounds),
        efficient=_efficient(findings.tables.get("efficiency")),
        curves=_inline(to_svg(curves), "image/svg+xml"),
        pictures={method: _inline(to_png(region_pictures(sheet), 110), "image/png") for method, sheet in shown.items()},
        asked=_asked(queries, classes),
        reasons=reasons_of(folder, pictures, name),
        classes=classes,
        seconds=seconds(rounds).to_dict("records"),
        by_round=_by_round(rounds),
    )
    path = out / "report.html"
    write_text(path, html)
    return path


def check_folders(folders: Sequence[Path], *, claim: bool, mixed: bool) -> None:
    """Refuse a report on runs that are not comparable, and with `claim` on too few seeds.

    Raises:
        RefereeError: see `eval.protocol.guards`.
    """
    if not mixed:
        check_same_origin([(str(folder), _manifest(folder)) for folder in folders if len(folders) > 1])
    for folder in folders:
        if (folder / "study.yaml").is_file():
            check_cells(steps_of(load_study(folder / "study.yaml"), folder))
        if claim:
            summary = summarise(only_methods(read_table(folder, "rounds")))
            check_seeds(dict(zip(summary["method"], summary["seeds"], strict=True)), "a ranking of methods")


def summary_text(folder: Path) -> str:
    """The summary table of a run for a terminal."""
    return plain_table(summarise(read_table(folder, "rounds")))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] | None = read_json(folder / "manifest.json")
    if manifest is None:
        raise RefereeError(f"{folder} holds no manifest.json, so no run to report; check the folder")
    return manifest


def _study_of(folder: Path) -> Study | None:
    """The run's study; None where only the tables were kept."""
    path = folder / "study.yaml"
    return load_study(path) if path.is_file() else None


def _about(study: Study | None, hidden: Hidden | None) -> str:
    about = study.about if study else ""
    return hidden.text(about) if hidden else about


def _described(study: Study | None) -> Described:
    return Described() if study is None else Described(study.about, study.published, study.factors, study.train)


def _pseudo(study: Study | None, queries: pd.DataFrame) -> pd.DataFrame:
    """Quality of pseudo labels, where the study makes some and its scans are at hand."""
    dataset = _dataset_of(study)
    return pd.DataFrame() if study is None or dataset is None else pseudo_quality(queries, dataset, study.train)


def _readers(study: Study | None, folder: Path) -> pd.DataFrame:
    """Last inter-rater agreement reported by the servers, of regions with a second reading; empty without any."""
    rows: list[dict[str, Any]] = []
    for method, seed, steps in steps_of(study, folder) if study else ():
        trained = [found.get("agreement") for name, found in steps.items() if name.endswith(".train")]
        said: dict[str, Any] = next((found for found in reversed(trained) if found), {})
        rows += [{"method": method, "seed": seed, "class": name, **found} for name, found in said.items()]
    table = pd.DataFrame(rows)
    return table[table["regions"] > 0] if rows else table


def _dataset_of(study: Study | None) -> Dataset | None:
    try:
        return read_dataset(study.data) if study is not None else None
    except RefereeError:
        return None


def _finished(rounds: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    cells = rounds.groupby(["method", "seed"]).ngroups
    planned = len(manifest["methods"]) * len(manifest["seeds"])
    return f"{cells} of {planned} cells, {len(rounds)} rounds" + ("" if manifest["finished"] else " (unfinished)")


def _summary_rows(rounds: pd.DataFrame) -> list[dict[str, str]]:
    summary = summarise(rounds)
    ranked = summary[summary["method"] != FULL_DATA]
    best = {name: ranked[name].max() for name in ("aubc", "final_dice")} | {"final_hd95": ranked["final_hd95"].min()}
    rows = []
    for row in summary.to_dict("records"):
        shown = {"method": str(row["method"]), "seeds": str(row["seeds"])}
        for name, decimals in (("aubc", 4), ("final_dice", 4), ("final_hd95", 2)):
            shown[name] = with_sd(row[name], row[f"{name}_sd"], decimals)
            shown[f"{name}_best"] = "best" if row[name] == best[name] and row["method"] != FULL_DATA else ""
        shown |= {cost: f"{row[cost]:,.0f}" for cost in SUMMED}
        rows.append({**shown, "share": f"{100 * row['foreground_fraction']:.2f} %"})
    return rows


def _efficient(fits: pd.DataFrame | None) -> dict[str, str]:
    """Published foreground efficiency of every method."""
    return (
        {}
        if fits is None
        else {m: with_sd(v, float("nan"), 2) for m, v in zip(fits["method"], fits["fg_eff"], strict=True)}
    )


def _by_round(rounds: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean Dice by method (rows) and round (columns)."""
    table = only_methods(rounds).pivot_table(
        index="method", columns="round", values="mean_dice", aggfunc="mean", sort=False
    )
    return [
        {"method": m, "dices": [f"{v:.4f}" if np.isfinite(v) else "" for v in row]}
        for m, row in zip(table.index, table.to_numpy(), strict=True)
    ]


def _asked(queries: pd.DataFrame, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Content of the regions of every method, without the starting budget."""
    rows: list[dict[str, Any]] = []
    if queries.empty:
        return rows
    for method, own in queries[queries["round"] > 0].groupby("method", sort=False):
        voxels = (own["dx"] * own["dy"] * own["dz"]).sum()
        shares = {
            name: f"{100 * own[f'voxels_{name}'].sum() / voxels:.2f} % ({(own[f'voxels_{name}'] > 0).sum()} regions)"
            for name in classes
        }
        empty = f"{100 * (own['foreground_voxels'] == 0).mean():.0f} %"
        rows.append({"method": method, "images": own["image"].nunique(), "empty": empty, "shares": shares})
    return rows


def _pictures(folder: Path, queries: pd.DataFrame, name: Callable[[str], str]) -> dict[str, list[Picture]]:
    """Last regions of every method's first seed, drawn on the scans; nothing where the scans are not at hand."""
    study = _study_of(folder)
    dataset = _dataset_of(study)
    if queries.empty or study is None or dataset is None:
        return {}
    sheets = {}
    for method, own in queries.groupby("method", sort=False):
        rows = own[own["seed"] == own["seed"].min()].sort_values("round").tail(_PICTURES)
        sheets[str(method)] = [_picture(row, dataset, study, name) for row in rows.to_dict("records")]
    return sheets


def _picture(row: Mapping[Any, Any], dataset: Dataset, study: Study, name: Callable[[str], str]) -> Picture:
    case = next(c for c in dataset.cases if c.id == str(row["image"]))
    image_xyz, affine, _ = read_volume(case.image)
    label_xyz = read_volume(case.label, placed=False).values_xyz.astype(np.uint8)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    start, size = np.array([row[k] for k in "xyz"]), np.array([row[k] for k in ("dx", "dy", "dz")])
    # A slice is seen face on; a patch in the plane with the best resolution.
    normal = _normal(size if study.unit == "slice" else -spacing)
    index = int(start[normal] + size[normal] // 2)
    u, v = (axis for axis in range(3) if axis != normal)
    return Picture(
        title=f"{name(case.id)}\nround {row['round']}, {'xyz'[normal]} = {index}",
        image_xy=np.take(image_xyz, index, axis=normal),
        label_xy=np.take(label_xyz, index, axis=normal),
        corner=(float(start[u]) - 0.5, float(start[v]) - 0.5),
        extent=(float(size[u]), float(size[v])),
        aspect=float(spacing[v] / spacing[u]),
    )


def _normal(thickness: NDArray[Any]) -> int:
    """Axis with the smallest value, the last of them on ties."""
    return int(np.flatnonzero(thickness == thickness.min())[-1])


def _inline(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
