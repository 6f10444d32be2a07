# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What all tests share: reference arrays, real scans and a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with reference arrays: outputs of the published projects, see its README.md."""
    return ROOT / "tests" / "reference"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real scans, which are not part of the project; without it, tests fail in CI and skip elsewhere."""
    folder = Path(os.environ.get("PATCHWISE_SHARED", ROOT.parent / "shared")) / "data"
    if (folder / "Task04_Hippocampus").is_dir():
        return folder
    message = (
        f"real scans not found at {folder}: set PATCHWISE_SHARED to the folder whose data/ holds Task04_Hippocampus"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser; missing it fails in CI and skips elsewhere."""
    if CHROMIUM:
        return CHROMIUM
    message = "no chromium on this machine; on Debian: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
