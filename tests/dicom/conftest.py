# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Tests on a PACS: Orthanc with phantoms as MR series, and the real MONAI Label server on its DICOMweb address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient

from eval.runner.server import ServerProcess, free_port
from tests.system.conftest import BUNDLE, ROOT, load_script

ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
PLUGINS = [
    path
    for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc")
    for path in (Path(folder) / "libOrthancDicomWeb.so",)
    if path.exists()
]
KEPT = ROOT / "runs" / "dicom"
CLASSES = {"anterior": 1, "posterior": 2}
# Seconds after which the server must have imported new series and segmentations of annotators.
SOON = 10.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.dicom)


@dataclass(frozen=True)
class Scan:
    """A case as DICOM: its slices, and its true label on their grid."""

    case: str
    files: list[Path]
    label_xyz: np.ndarray

    @property
    def slices(self) -> list[pydicom.Dataset]:
        return [pydicom.dcmread(file) for file in self.files]

    @property
    def uid(self) -> str:
        return str(pydicom.dcmread(self.files[0], stop_before_pixels=True).SeriesInstanceUID)

    @property
    def study(self) -> str:
        return str(pydicom.dcmread(self.files[0], stop_before_pixels=True).StudyInstanceUID)


class Orthanc:
    """A PACS of its own on the loopback address."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/dicom-web"
        self.config = folder / "orthanc.json"
        self.config.write_text(
            json.dumps(
                {
                    "Name": "phantoms",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "HttpPort": self.port,
                    "DicomServerEnabled": False,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "Plugins": [str(PLUGINS[0])],
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
                }
            )
        )
        self.log = folder / "orthanc.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [ORTHANC, str(self.config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until(lambda: self._answers(), 60, "Orthanc answers")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def send(self, files: list[Path]) -> None:
        for file in files:
            httpx.post(f"{self.root}/instances", content=file.read_bytes(), timeout=60).raise_for_status()

    def delete(self, series: str) -> None:
        found = httpx.post(f"{self.root}/tools/lookup", content=series).json()[0]["ID"]
        httpx.delete(f"{self.root}/series/{found}").raise_for_status()

    def segmentations(self, study: str) -> list[pydicom.Dataset]:
        client = DICOMwebClient(self.url)
        found = client.search_for_series(study, search_filters={"Modality": "SEG"})
        return [client.retrieve_series(study, item["0020000E"]["Value"][0])[0] for item in found]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.root}/system").status_code == 200
        except httpx.TransportError:
            return False


class Address(str):
    """A DICOMweb address in the place of a studies folder, which a server process makes where it is missing."""

    def mkdir(self, **_options: Any) -> None:
        pass


class PacsServer(ServerProcess):
    """The app on a DICOMweb address."""

    def __init__(self, url: str, conf: dict[str, Any], *, log: Path) -> None:
        env = {"MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}'}
        super().__init__(log.parent, conf, log=log, threads=1, env=env)
        self.studies = Address(url)


def until(true: Callable[[], Any], seconds: float, what: str) -> float:
    """Wait for a condition; return the time in seconds."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > seconds:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Scan]:
    """Five phantoms as MR series."""
    folder = tmp_path_factory.mktemp("scans")
    assert load_script(ROOT / "sample-datasets" / "phantoms.py").main([str(folder / "nifti"), "--cases", "5"]) == 0
    load_script(ROOT / "sample-datasets" / "dicom.py").folder_to_dicom(folder / "nifti", folder / "dicom")
    return [_scan(case, folder / "nifti") for case in sorted((folder / "dicom").iterdir())]


@pytest.fixture(scope="session")
def real_scans(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> list[Scan]:
    """Two real hippocampi as MR series."""
    task = real_data / "Task04_Hippocampus"
    folder = tmp_path_factory.mktemp("real")
    script = load_script(ROOT / "sample-datasets" / "dicom.py")
    classes = {"anterior": 1, "posterior": 2}
    images = sorted(p for p in (task / "imagesTr").glob("*.nii.gz") if not p.name.startswith("."))[:2]
    for image in images:
        label = task / "labelsTr" / image.name
        script.to_dicom(image, label, classes, "MR", folder / image.name.removesuffix(".nii.gz"))
    return [_scan(case, task) for case in sorted(folder.iterdir())]


@pytest.fixture(scope="session")
def make_orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Orthanc]]:
    """Start an empty Orthanc per call; all of them are stopped at the end."""
    if not Path(ORTHANC).exists() or not PLUGINS:
        pytest.skip("no Orthanc with its DICOMweb plugin; `make system-test-dicom` installs them on Debian")
    started: list[Orthanc] = []

    def make() -> Orthanc:
        started.append(Orthanc(tmp_path_factory.mktemp("orthanc")))
        started[-1].start()
        return started[-1]

    yield make
    for orthanc in started:
        orthanc.stop()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a recipe of a few steps."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(ROOT / "bundles" / BUNDLE, folder / BUNDLE)
    path = folder / BUNDLE / "configs" / "network.json"
    network = json.loads(path.read_text())
    network["recipe"] |= {"steps": 150, "patch": [16, 16, 16], "batch": 2}
    path.write_text(json.dumps(network))
    return folder


Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> Iterator[Serve]:
    """Start the app on a DICOMweb address; all servers are stopped at the end."""
    started: list[ServerProcess] = []

    def start(url: str, state: Path, **conf: Any) -> ServerProcess:
        defaults = {"models": BUNDLE, "bundles": bundles, "labels": "anterior,posterior", "members": 1, "batch": 4}
        defaults |= {"size": "12,12,12", "plan": "bundle", "state": state}
        server = PacsServer(url, {**defaults, **conf}, log=state.parent / "server.log")
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def _scan(case: Path, nifti: Path) -> Scan:
    label = nib.load(nifti / "labelsTr" / f"{case.name}.nii.gz")
    return Scan(case.name, sorted((case / "image").glob("*.dcm")), np.asarray(label.dataobj).astype(np.uint8))
