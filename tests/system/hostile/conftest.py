# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A server whose surrounding files are checked."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import Client, Start, fill


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own around the studies, with a temporary folder for the server beside them."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tmp").mkdir()
    (folder / "outside.nii.gz").write_bytes(b"somebody else's")
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, place: Path, phantoms: Path) -> Client:
    fill(place / "studies", phantoms)
    # Writes beside the studies must be detected, so the temporary files are here too.
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(place / "tmp")
    try:
        started, made = start_server(place / "studies", members=2, batch=4, size="12,12,12")
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.__setitem__("TMPDIR", before)
    assert started.process is not None
    made.process = psutil.Process(started.process.pid)  # type: ignore[attr-defined]
    made.at_start = sorted(p.name for p in (place / "tmp").iterdir())  # type: ignore[attr-defined]
    return made
