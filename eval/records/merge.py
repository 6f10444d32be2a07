# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Parts of one study, run apart: which cells to run, and joining the folders of several parts into one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.errors import RefereeError
from eval.files import read_json, write_json, write_text
from eval.protocol.guards import check_cells, check_same_origin, steps_of
from eval.protocol.study import Study, load_study, save_study
from eval.records.tables import write_tables


def merge_parts(parts: Sequence[Path], out: Path, *, mixed: bool = False) -> tuple[int, int]:
    """Join the finished cells of several runs of one study in the new folder `out`; return (cells there, planned).

    Only the steps of every cell are joined, as needed by a report. Servers' folders stay behind, so `out` can be
    reported and merged again, but not resumed in the middle of a cell. With `mixed`, runs of different hardware,
    versions or code are joined, and the manifest records this.

    Raises:
        RefereeError: a folder in use, no run, another study or other data, another origin, a cell that is finished
            with other results in two parts, methods that cannot be compared.
    """
    if out.exists() and any(out.iterdir()):
        raise RefereeError(f"{out} is not empty; name a new folder")
    studies = [_study(part) for part in parts]
    manifests: list[dict[str, Any]] = [read_json(part / "manifest.json") for part in parts]
    for part, study, manifest in zip(parts, studies, manifests, strict=True):
        # The path of the data may differ between machines; the digest shows that the content is equal.
        if study.model_copy(update={"data": studies[0].data}) != studies[0]:
            raise RefereeError(f"{part} and {parts[0]} ran different studies; see study.yaml of both")
        if manifest["data"]["digest"] != manifests[0]["data"]["digest"]:
            raise RefereeError(f"{part} and {parts[0]} ran on different data; merge runs on the same scans and labels")
    if not mixed:
        check_same_origin([(str(part), manifest) for part, manifest in zip(parts, manifests, strict=True)])
    study, found = studies[0], _finished_cells(studies[0], parts)
    check_cells([steps for part in parts for steps in steps_of(study, part) if found.get(steps.name) == part])
    out.mkdir(parents=True, exist_ok=True)
    for name, part in found.items():
        source, target = part / "cells" / name, out / "cells" / name
        target.mkdir(parents=True)
        shutil.copyfile(source / "state.json", target / "state.json")
        if (source / "pictures").is_dir():
            shutil.copytree(source / "pictures", target / "pictures")
    planned = len(study.lines) * len(study.seeds)
    write_json(out / "manifest.json", _manifest(parts, manifests, whole=len(found) == planned))
    write_text(out / "study.yaml", save_study(study))
    write_tables(study, out)
    return len(found), planned


def _study(part: Path) -> Study:
    if not (part / "study.yaml").is_file() or not (part / "manifest.json").is_file():
        raise RefereeError(f"{part} holds no study.yaml and manifest.json, so no run to merge; check the folder")
    return load_study(part / "study.yaml")


def _finished_cells(study: Study, parts: Iterable[Path]) -> dict[str, Path]:
    """The part that has each finished cell, in the order of the study."""
    found: dict[str, Path] = {}
    for part in parts:
        for cell in steps_of(study, part):
            rounds = next(n for method, n in study.lines if method.label == cell.method)
            if f"{rounds - 1}.test" not in cell.steps:
                continue
            if cell.name in found and _state(part, cell.name) != _state(found[cell.name], cell.name):
                raise RefereeError(
                    f"{part} and {found[cell.name]} both finished {cell.name}, with other results; merge one"
                )
            found.setdefault(cell.name, part)
    if not found:
        raise RefereeError("no part has a finished cell; run or resume them first")
    names = [f"{method.label}_s{seed}" for seed in study.seeds for method, _ in study.lines]
    return {name: found[name] for name in names if name in found}


def _state(part: Path, name: str) -> Any:
    return read_json(part / "cells" / name / "state.json")["steps"]


def _manifest(parts: Sequence[Path], manifests: Sequence[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
    """The first part's manifest, from the first start to the last end, with the origins that differ from it."""
    origins = [{key: m[key] for key in ("hardware", "versions")} for m in manifests]
    others = [origin for origin in origins[1:] if origin != origins[0]]
    noted = [*(entry for m in manifests for entry in m.get("mixed", [])), *others]
    merged = [
        {"folder": part.name, "started": m["started"], "command": m["command"]}
        for part, m in zip(parts, manifests, strict=True)
    ]
    ends = [m["finished"] for m in manifests if m["finished"]]
    return {
        **{key: value for key, value in manifests[0].items() if key not in ("only", "mixed")},
        "started": min(m["started"] for m in manifests),
        "finished": max(ends) if whole and ends else None,
        "parts": merged,
        **({"mixed": noted} if noted else {}),
    }
