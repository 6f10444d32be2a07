# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Queried regions of another run, replayed under another recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from eval.errors import RefereeError


def read_loop(path: Path) -> list[dict[str, Any]]:
    """Regions of one loop file of nnActive, as `precomputed` takes them: axes x, y, z of the stored image.

    Raises:
        RefereeError: not such a file, or patches that are whole images.
    """
    try:
        patches = json.loads(path.read_text())["patches"]
        return [
            {
                "image": patch["file"].removesuffix(".nii.gz"),
                "start": [int(v) for v in patch["coords"][::-1]],
                "size": [int(v) for v in patch["size"][::-1]],
            }
            for patch in patches
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefereeError(
            f"{path} is not a loop file of nnActive with patches of file, coords and size ({error!r}); check the path"
        ) from error


def replayed(folder: Path, method: str, seed: int, round_: int) -> list[dict[str, Any]]:
    """Regions of one method, seed and round of the run in `folder`, in the format of the method `precomputed`.

    For a folder with loop files of nnActive, the result is the regions of the round, for any method and seed.

    Raises:
        RefereeError: no such run, or none of its regions belongs to the method, seed and round.
    """
    loop = folder / f"loop_{round_:03d}.json"
    if loop.is_file():
        return read_loop(loop)
    path = folder / "queries.csv"
    if not path.is_file():
        raise RefereeError(f"{path} does not exist; run the study whose queries are to be replayed first")
    table = pd.read_csv(path)
    own = table[(table["method"] == method) & (table["seed"] == seed) & (table["round"] == round_)]
    if own.empty:
        raise RefereeError(f"{path} holds no query of {method}, seed {seed}, round {round_}; finish that run first")
    return [
        {"image": row["image"], "start": [row["x"], row["y"], row["z"]], "size": [row["dx"], row["dy"], row["dz"]]}
        for row in own.to_dict("records")
    ]
