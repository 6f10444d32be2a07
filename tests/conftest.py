# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What all tests share: where the reference arrays and the real scans are, and a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden arrays and real scans; missing it fails in CI and skips elsewhere."""
    folder = Path(os.environ.get("PATCHWISE_SHARED", ROOT.parent / "shared"))
    if folder.is_dir():
        return folder
    message = f"reference arrays and scans are not at {folder}; set PATCHWISE_SHARED"
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
