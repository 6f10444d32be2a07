# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Tests of real clients: one MONAI Label server for a module, and images small enough to compute by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from eval.runner.server import ServerProcess
from tests.system.conftest import BUNDLE, ROOT
from tests.warm import WarmProcess, WarmServer

SHAPE = (20, 16, 12)
# Rotated about the axis of the patient by the angle of a 3-4-5 triangle, stored left-handed; voxels of 2 x 1 x 3 mm.
AFFINE = np.array([[-1.6, -0.6, 0, 10], [-1.2, 0.8, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]], dtype=float)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images without labels; one has a blank and a plus in its name, which an address must not lose."""
    folder = tmp_path_factory.mktemp("clients") / "studies"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name in ("scan 7+8", *(f"scan_{number:02d}" for number in range(15))):
        image = rng.normal(size=SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(image, AFFINE), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a recipe of two steps, since Slicer cannot request a number of steps."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(ROOT / "bundles" / BUNDLE, folder / BUNDLE)
    path = folder / BUNDLE / "configs" / "network.json"
    network = json.loads(path.read_text())
    network["recipe"] |= {"steps": 2, "patch": [16, 16, 8], "batch": 2}
    path.write_text(json.dumps(network))
    return folder


@pytest.fixture(scope="module")
def server(studies: Path, bundles: Path, warm: WarmProcess) -> Iterator[ServerProcess]:
    conf = {"models": BUNDLE, "bundles": bundles, "labels": "anterior,posterior", "members": 1, "batch": 4}
    conf |= {"size": "6,5,4", "plan": "bundle"}
    process = WarmServer(studies, conf, log=studies.parent / "server.log", threads=1, warm=warm)
    process.start()
    yield process
    process.stop()
