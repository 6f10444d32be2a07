# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Fixtures every part of the tests shares."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference data beside the repository, or PATCHWISE_SHARED; needed in CI, optional elsewhere."""
    folder = Path(os.environ.get("PATCHWISE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        reason = f"reference data {folder} is missing; set PATCHWISE_SHARED"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder
