# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Exchange with other tools: nnActive's loop files, and the annotated pool as an nnU-Net dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from eval.errors import RefereeError
from eval.files import place, write_bytes, write_json
from eval.protocol.annotator_profiles import UNLABELLED, answers
from eval.protocol.dataset import load_truth, read_dataset
from eval.protocol.oracle import to_nifti
from eval.protocol.study import load_study
from eval.records.tables import read_table

_ENDING = ".nii.gz"


def write_loops(folder: Path, method: str, seed: int, out: Path, names: Mapping[str, str] | None = None) -> list[Path]:
    """Write the queries of a cell as nnActive's loop_000.json, loop_001.json, ...: new patches per round, axes z, y, x.

    `names` gives other names to images.

    Raises:
        RefereeError: no such method and seed in the run.
    """
    paths = []
    for round_, own in _asked(folder, method, seed).groupby("round"):
        patches = [
            {
                "file": f"{_named(row['image'], names)}{_ENDING}",
                "coords": [int(row[k]) for k in "zyx"],
                "size": [int(row[k]) for k in ("dz", "dy", "dx")],
            }
            for row in own.to_dict("records")
        ]
        paths.append(out / f"loop_{int(str(round_)):03d}.json")
        write_json(paths[-1], {"patches": patches})
    return paths


def write_nnunet(
    folder: Path, method: str, seed: int, round_: int, out: Path, names: Mapping[str, str] | None = None
) -> Path:
    """Write the pool as annotated after `round_` as an nnU-Net dataset whose unlabelled voxels are its ignore label.

    Images without a region are left out, as nnU-Net cannot train on them. The ignore label is the largest class id plus
    one, as nnU-Net requires. `names` gives other names to images, whose headers then hold the grid and no more.

    Raises:
        RefereeError: a folder in use, no such method and seed, or missing scans.
    """
    if out.exists() and any(out.iterdir()):
        raise RefereeError(f"{out} is not empty; name a new folder")
    study = load_study(folder / "study.yaml")
    dataset = read_dataset(study.data)
    asked = _asked(folder, method, seed)
    asked = asked[asked["round"] <= round_]
    ignore = max(dataset.labels.values()) + 1
    for case in dataset.cases:
        own = asked[asked["image"] == case.id]
        if own.empty:
            continue
        truth = load_truth(case)
        regions = [_region(row) for row in own.to_dict("records")]
        painted_xyz = answers(
            truth.label_xyz,
            regions,
            study.oracle,
            seed,
            foreground=dataset.foreground,
            spacing=truth.spacing,
            axis=study.slice_axis,
        )
        seen_xyz = np.zeros(truth.label_xyz.shape, dtype=bool)
        for region in regions:
            seen_xyz[tuple(slice(a, a + d) for a, d in zip(region["start"], region["size"], strict=True))] = True
        label_xyz = np.where(seen_xyz & (painted_xyz != UNLABELLED), painted_xyz, ignore).astype(np.uint8)
        name = _named(case.id, names)
        write_bytes(out / "labelsTr" / f"{name}{_ENDING}", to_nifti(label_xyz, truth.affine))
        image = out / "imagesTr" / f"{name}_0000{_ENDING}"
        image.parent.mkdir(exist_ok=True)
        if names is not None:
            stored = nib.load(case.image)
            nib.save(nib.Nifti1Image(np.asanyarray(stored.dataobj), truth.affine), image)  # type: ignore[attr-defined]
        elif case.image.name.endswith(_ENDING):
            place(case.image, image)
        else:
            nib.save(nib.load(case.image), image)
    card = {
        "channel_names": {"0": "image"},
        "labels": {**dataset.labels, "ignore": ignore},
        "numTraining": int(asked["image"].nunique()),
        "file_ending": _ENDING,
    }
    write_json(out / "dataset.json", card)
    return out


def _named(image: str, names: Mapping[str, str] | None) -> str:
    return str(image) if names is None else names[str(image)]


def _region(row: dict[Any, Any]) -> dict[str, Any]:
    return {
        "query": int(row["query"]),
        "image": row["image"],
        "start": [int(row[k]) for k in "xyz"],
        "size": [int(row[k]) for k in ("dx", "dy", "dz")],
    }


def _asked(folder: Path, method: str, seed: int) -> pd.DataFrame:
    table = read_table(folder, "queries")
    own: pd.DataFrame = table[(table["method"] == method) & (table["seed"] == seed)]
    if own.empty:
        known = ", ".join(sorted({f"{m} {s}" for m, s in zip(table["method"], table["seed"], strict=True)}))
        raise RefereeError(f"{folder} holds no query of {method} with seed {seed}; it has {known}")
    return own
