# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""System tests: the real MONAI Label server on phantoms, one server for all tests that can share it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from eval.runner.server import ServerProcess
from tests.system.realm import GuardedServer, guarded_server
from tests.warm import WarmProcess, WarmServer

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = "segmentation_dynunet_3d"
# A study of seconds; the test sets the folder of its data.
TINY_STUDY = {
    "name": "tiny",
    "split": {"test_fraction": 0.25},
    "bundle": BUNDLE,
    "unit": "patch",
    "size": [12, 12, 12],
    "starting_budget": {"method": "starting_budget", "batch": 6},
    "rounds": 2,
    "batch": 4,
    "methods": ["power_pe"],
    "seeds": [1],
    "train": {"members": 2, "steps": 12, "patch": [16, 16, 16]},
}
CLASSES = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)


def load_script(path: Path) -> ModuleType:
    """A script as a module, although its folder is not a package."""
    import sys

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight phantoms in a decathlon-style folder."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    script = load_script(ROOT / "sample-datasets" / "phantoms.py")
    assert script.main([str(folder), "--cases", "8", "--seed", "3"]) == 0
    return folder


def fill(studies: Path, phantoms: Path, count: int = 6) -> None:
    """Images of the first phantoms and the class names, without labels."""
    studies.mkdir(parents=True, exist_ok=True)
    for image in sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:count]:
        shutil.copy(image, studies)
    shutil.copy(phantoms / "dataset.json", studies)


class Client:
    """A minimal MONAI Label client with the requests of Slicer."""

    def __init__(self, url: str, phantoms: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=300)
        self.phantoms = phantoms

    def ask(self, method: str, **request: Any) -> httpx.Response:
        return self.http.post(f"/activelearning/{method}", json={"client_id": "ann", **request})

    def submit(self, image: str, label: Path | None = None, **params: Any) -> httpx.Response:
        path = label or self.phantoms / "labelsTr" / f"{image}.nii.gz"
        sent = json.dumps({"client_id": "ann", "label_info": CLASSES, **params})
        with open(path, "rb") as stream:
            return self.http.put(
                "/datastore/label",
                params={"image": image, "tag": "final"},
                data={"params": sent},
                files={"label": (path.name, stream)},
            )

    def train(self, **request: Any) -> dict[str, Any]:
        import time

        reply = self.http.post(f"/train/{BUNDLE}", json=request)
        reply.raise_for_status()
        while True:
            task = self.http.get("/train/").json()
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(0.2)


Start = Callable[..., tuple[ServerProcess, Client]]


@pytest.fixture(scope="session")
def start_server(phantoms: Path, warm: WarmProcess) -> Iterator[Start]:
    """Start servers on studies folders; all of them are stopped at the end."""
    started: list[ServerProcess] = []

    def start(studies: Path, **conf: Any) -> tuple[ServerProcess, Client]:
        log = studies.parent / f"{studies.name}.log"
        server = WarmServer(studies, {"models": BUNDLE, **conf}, log=log, threads=1, warm=warm)
        server.start()
        started.append(server)
        return server, Client(server.url, phantoms)

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[GuardedServer]:
    """A server with MONAI Label's authentication on, on two images."""
    folder = tmp_path_factory.mktemp("guarded")
    fill(folder / "secret_project", phantoms, 2)
    with guarded_server(folder / "secret_project", {"models": BUNDLE}, folder / "log") as server:
        yield server
