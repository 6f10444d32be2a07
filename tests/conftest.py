# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Shared parts of all tests: reference arrays, real scans, a browser, and the grouping of tests."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.warm import WarmProcess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).resolve().parents[1]
WITH_SERVERS = ("clients", "faults", "system")

# The duration of an example depends more on the machine than on the code.
settings.register_profile("patchwise", deadline=None)
settings.load_profile("patchwise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part",
        metavar="K/N",
        help="run only part K (0 to N - 1) of the slow tests",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("--slow-part"):
        left_out = other_parts([item for item in items if item.get_closest_marker("slow")], part)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        # Tests of a file share its fixtures; a mark of their own lets files share a server.
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT / "tests"))))
    # Servers first: a long group that starts last leaves the other workers idle.
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").parts[0] not in WITH_SERVERS)


def other_parts(slow: list[pytest.Item], part: str) -> list[pytest.Item]:
    """Slow tests of all parts but one; parts are equally large, and do not depend on the order of files."""
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise pytest.UsageError(f"--slow-part {part}: expected K/N with K from 0 to N - 1, for example 0/4")
    ordered = sorted(slow, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
    return [item for place, item in enumerate(ordered) if place % int(count) != int(number)]


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
def warm() -> Iterator[WarmProcess]:
    """A process from which servers start without their imports; one per worker."""
    process = WarmProcess()
    yield process
    process.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser; missing it fails in CI and skips elsewhere."""
    if CHROMIUM:
        return CHROMIUM
    message = "no chromium on this machine; on Debian: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
