# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A stand-in of 3D Slicer's MONAI Label module: the requests it makes, in its order, through MONAI Label's client.

ITK, which Slicer also reads and writes images with, loads volumes, and imports and exports segments.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import itk
import numpy as np
from monailabel.client import MONAILabelClient
from monailabel.client import client as client_module

NOT_EXPORTED = ("background", "foreground_scribbles", "background_scribbles")


class SlicerModule:
    """One annotator at one Slicer with its default settings.

    `segments` are the segments of the scene in their order, name -> mask over the volume's voxels; `rois` the markups
    that were loaded.
    """

    def __init__(self, url: str, folder: Path, client_id: str = "user-xyz") -> None:
        self.url = url
        self.folder = folder
        self.client_id = client_id
        self.info: dict[str, Any] = {}
        self.sample: dict[str, Any] = {}
        self.volume: Any = None
        self.volume_name = ""
        self.segments: dict[str, np.ndarray] = {}
        self.rois: list[dict[str, Any]] = []
        self.model = ""
        folder.mkdir(parents=True, exist_ok=True)

    def _client(self) -> MONAILabelClient:
        # A new one per request; it first checks whether a login is necessary.
        client = MONAILabelClient(self.url, str(self.folder), self.client_id)
        assert not client.auth_enabled()
        return client

    def fetch_info(self) -> None:
        """The round arrow beside the server's address; also after each submission."""
        self.info = self._client().info()
        self.model = self.model or next(iter(self.info["models"]))
        self._client().train_status(check_if_running=True)

    def config(self, section: str, name: str) -> dict[str, Any]:
        """Values of the table of options for a model, trainer or strategy: of a list the first entry."""
        config = self.info[section].get(name, {}).get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def next_sample(self, strategy: str, shared: bool = True) -> None:
        """The button Next Sample. Where server and Slicer share a disk the image is read from there."""
        sample = self._client().next_sample(strategy, self.config("strategies", strategy))
        if not sample.get("id"):
            self.sample = {}
            return
        path = Path(sample["path"])
        if not (shared and path.exists()):
            path = self.folder / sample.get("name", sample["id"])
            urllib.request.urlretrieve(f"{self.url}/datastore/image?image={quote_plus(sample['id'])}", path)
        labels = self._client().datastore()["objects"][sample["id"]]["labels"]
        assert "original" not in labels
        self.load(sample, path)
        self._auto_run()

    def load(self, sample: dict[str, Any], path: Path) -> None:
        """A volume in a new scene, with an empty segment for every class."""
        self.sample, self.rois = sample, []
        self.volume = itk.imread(str(path))
        self.volume_name = sample.get("PatientID", sample.get("name", sample["id"]))
        shape = itk.array_view_from_image(self.volume).T.shape
        self.segments = {name: np.zeros(shape, bool) for name in self.info["labels"]}

    def upload(self, path: Path) -> None:
        """The button Upload Volume, for a volume that was opened from a file of this computer."""
        name = path.name.removesuffix(".nii.gz")
        sent = self.folder / "tmp3hx71.nii.gz"
        shutil.copyfile(path, sent)
        self._client().upload_image(str(sent), name)
        self.load({"id": name}, path)

    def _auto_run(self) -> None:
        for label in self.info["labels"]:
            for name, model in self.info["models"].items():
                if label in model["labels"]:
                    self.model = name
                    self.run()
                    return

    def run(self) -> None:
        """The button Run of Auto Segmentation."""
        params = {**self.config("models", self.model), "result_extension": ".nrrd", "result_dtype": "uint8"}
        result, answer = self._client().infer(self.model, self.sample["id"], params)
        labels = answer.get("label_names") or self.info["models"][self.model]["labels"]
        self._show(Path(result), [name for name, _ in sorted(labels.items(), key=lambda item: item[1])])

    def _show(self, result: Path, names: list[str]) -> None:
        if result.name.endswith(".json"):
            self.rois += json.loads(result.read_text())["markups"]
            return
        image = itk.imread(str(result))
        assert np.allclose(np.asarray(image.GetOrigin()), np.asarray(self.volume.GetOrigin()), atol=1e-4)
        assert np.allclose(
            itk.array_from_matrix(image.GetDirection()), itk.array_from_matrix(self.volume.GetDirection())
        )
        label_xyz = itk.array_from_image(image).T
        for value, name in enumerate((name for name in names if name != "background"), start=1):
            self.segments[name] = label_xyz == value

    def submit(self) -> dict[str, Any]:
        """The button Submit Label; values are places among the exported segments, `idx` places among all of them."""
        exported = [name for name in self.segments if name not in NOT_EXPORTED]
        label_xyz = np.zeros(next(iter(self.segments.values())).shape, np.uint8)
        for value, name in enumerate(exported, start=1):
            label_xyz[self.segments[name]] = value
        order = list(self.segments)
        label_info = [{"name": name, "idx": order.index(name) + 1} for name in exported]
        image = itk.image_from_array(np.ascontiguousarray(label_xyz.T))
        image.CopyInformation(self.volume)
        path = self.folder / "tmp8w2kq.nii.gz"
        itk.imwrite(image, str(path))
        saved = self._client().save_label(self.sample["id"], str(path), params={"label_info": label_info})
        self.fetch_info()
        return saved

    def train(self, trainer: str) -> dict[str, Any]:
        """The button Train; the panel is redrawn a second later."""
        started = self._client().train_start(trainer, self.config("trainers", trainer))
        time.sleep(1)
        return started

    def training_runs(self) -> bool:
        """Request at every redraw of the panel."""
        return bool(self._client().train_status(check_if_running=True))

    def training_status(self) -> dict[str, Any]:
        """Request every five seconds during a training."""
        return self._client().train_status(check_if_running=False)

    def stop_training(self) -> dict[str, Any]:
        """The button Stop."""
        return self._client().train_stop()


def _geometry(image: Any) -> list[Any]:
    return [image.GetOrigin(), image.GetSpacing(), itk.array_from_matrix(image.GetDirection())]


@contextmanager
def recorded(port: int) -> Iterator[list[bytes]]:
    """Every request made meanwhile, as the bytes that went to the server; the address is written as `SERVER`."""
    requests: list[bytes] = []

    class Recorder(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            requests.append(b"")

        def send(self, data: Any) -> None:
            if self.sock is None:
                self.connect()
            requests[-1] += bytes(data).replace(f"127.0.0.1:{port}".encode(), b"SERVER")
            super().send(data)

    original = client_module.http.client.HTTPConnection
    client_module.http.client.HTTPConnection = Recorder
    try:
        yield requests
    finally:
        client_module.http.client.HTTPConnection = original
