# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Images and true labels for a pool of any size, from a few phantoms."""

from __future__ import annotations

from pathlib import Path

from tests.system.conftest import ROOT, load_script

CASES = 8


def make_pool(folder: Path, count: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """Image -> its file and image -> the file of its true label, in turn from eight phantoms."""
    script = load_script(ROOT / "sample-datasets" / "phantoms.py")
    assert script.main([str(folder), "--cases", str(CASES), "--seed", "3"]) == 0
    scans = sorted((folder / "imagesTr").glob("*.nii.gz"))
    names = [f"scan_{number:04d}" for number in range(count)]
    images = {name: scans[number % CASES] for number, name in enumerate(names)}
    return images, {name: folder / "labelsTr" / path.name for name, path in images.items()}
