# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Odd files: small scans, labels as clients save them, and a server on a folder of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from tests.system.conftest import BUNDLE
from tests.warm import WarmProcess, WarmServer

AFFINE = np.array([[-1, 0, 0, 10], [0, -1.5, 0, 20], [0, 0, 2, -30], [0, 0, 0, 1.0]])
INFO = [{"name": "a", "idx": 1}, {"name": "b", "idx": 2}]
TRAINING = {"recipe": "quick", "steps": 2, "members": 1}


def scan(seed: int = 1, shape: tuple[int, int, int] = (24, 20, 16)) -> np.ndarray:
    """Noise, a bright blob (class a) and a dark one (class b)."""
    values = np.random.default_rng(seed).normal(0, 20, shape)
    place = np.indices(shape).transpose(1, 2, 3, 0) / np.maximum(np.array(shape) - 1, 1)
    values[((place - [0.3, 0.35, 0.4]) ** 2).sum(-1) < 0.04] = 400
    values[((place - [0.7, 0.55, 0.6]) ** 2).sum(-1) < 0.02] = -400
    return values.astype(np.int16)


def truth(values: np.ndarray) -> np.ndarray:
    return np.where(values > 200, 1, np.where(values < -200, 2, 0)).astype(np.uint8)


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def stored(studies: Path, image: str) -> np.ndarray:
    return np.asarray(nib.load(studies / "labels" / "final" / f"{image}.nii.gz").dataobj)


def ras(image: Any) -> np.ndarray:
    """Affine to RAS of an ITK image."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


class Annotator:
    """A client of one server: queries, reads frames, saves labels, trains and scores."""

    def __init__(self, url: str, studies: Path, log: Path, name: str = "ann") -> None:
        self.http = httpx.Client(base_url=url, timeout=300)
        self.studies, self.log, self.name = studies, log, name

    def ask(self, method: str = "random", **request: Any) -> httpx.Response:
        return self.http.post(f"/activelearning/{method}", json={"client_id": self.name, **request})

    def infer(self, model: str, image: str, folder: Path) -> Any:
        """Result of a model as ITK reads it."""
        sent = json.dumps({"client_id": self.name, "result_extension": ".nrrd"})
        reply = self.http.post(f"/infer/{model}", params={"image": image, "output": "image"}, data={"params": sent})
        assert reply.status_code == 200, reply.text
        (folder / "result.nrrd").write_bytes(reply.content)
        return sitk.ReadImage(str(folder / "result.nrrd"))

    def submit(self, image: str, path: Path, info: Any = INFO, **params: Any) -> httpx.Response:
        sent = {"client_id": self.name, **({} if info is None else {"label_info": info}), **params}
        with open(path, "rb") as stream:
            return self.http.put(
                "/datastore/label",
                params={"image": image, "tag": "final"},
                data={"params": json.dumps(sent)},
                files={"label": (path.name, stream)},
            )

    def train(self, **request: Any) -> httpx.Response:
        return self.http.post(f"/train/{BUNDLE}", params={"run_sync": True}, json={**TRAINING, **request})

    def score(self, **request: Any) -> httpx.Response:
        return self.http.post("/scoring/predictive_entropy", params={"run_sync": True}, json=request)

    def info(self) -> dict[str, Any]:
        return self.http.get("/info/").json()["patchwise"]

    def pool(self) -> list[str]:
        return sorted(self.http.get("/datastore/", params={"output": "all"}).json()["objects"])


@pytest.fixture(scope="session")
def serve(warm: WarmProcess) -> Iterator[Callable[..., Annotator]]:
    """Start servers on studies folders; all of them are stopped at the end."""
    started: list[WarmServer] = []

    def start(studies: Path, **conf: Any) -> Annotator:
        log = studies.parent / f"{studies.name}.log"
        server = WarmServer(studies, {"models": BUNDLE, "labels": "a,b", **conf}, log=log, threads=1, warm=warm)
        server.start()
        started.append(server)
        return Annotator(server.url, studies, log)

    yield start
    for server in started:
        server.stop()


def seg_nrrd(
    path: Path,
    layers: np.ndarray,
    segments: list[tuple[str, int | None, int | None]],
    affine: np.ndarray = AFFINE,
    **more: str,
) -> Path:
    """A file as 3D Slicer saves a segmentation: (X, Y, Z) or (layers, X, Y, Z), and name, value, layer of segments."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    many, directions = layers.ndim == 4, lps[:3, :3].T
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "kinds": (["list"] if many else []) + ["domain"] * 3,
        "space directions": np.vstack([[np.nan] * 3, directions]) if many else directions,
        "space origin": lps[:3, 3],
        "encoding": "gzip",
    }
    for place, (name, value, layer) in enumerate(segments):
        header |= {f"Segment{place}_ID": f"Segment_{place + 1}", f"Segment{place}_Name": name}
        header |= {} if value is None else {f"Segment{place}_LabelValue": str(value)}
        header |= {} if layer is None else {f"Segment{place}_Layer": str(layer)}
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), layers, {**header, **more})
    return path
