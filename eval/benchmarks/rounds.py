# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cost of a round: training five members at once or in five calls.

Timed on the real server, in seconds of wall time, because the savings are start-ups and idle cores. It therefore needs
a machine without other work.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

from eval.benchmarks import Row
from eval.benchmarks.timing import row
from eval.protocol.oracle import to_nifti
from eval.runner.client import LabelClient
from eval.runner.server import PROJECT, ServerProcess

BUNDLE = "segmentation_dynunet_3d"
MEMBERS = 5
STEPS = 150
CASES = 12
FIRST_STEP_SECONDS = 10.0


def run() -> Iterator[Row]:
    """Rows of a round, each as it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        images, labels = phantoms(Path(folder) / "pool", CASES)
        yield from training_rows(Path(folder), images, labels)


def phantoms(folder: Path, cases: int) -> tuple[list[Path], list[Path]]:
    """Paths of generated images and of their labels."""
    sys.path.insert(0, str(PROJECT / "sample-datasets"))
    try:
        from phantoms import PRESETS, make_dataset
    finally:
        sys.path.pop(0)
    make_dataset(folder, PRESETS["hippocampus"], cases, 1)
    return sorted((folder / "imagesTr").glob("*.nii.gz")), sorted((folder / "labelsTr").glob("*.nii.gz"))


def training_rows(folder: Path, images: list[Path], labels: list[Path]) -> Iterator[Row]:
    """Five members in one call and in five calls, and the seconds until the first step of the former."""
    studies = folder / "studies"
    studies.mkdir()
    for path in images:
        (studies / path.name).symlink_to(path)
    (studies / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    threads = psutil.cpu_count(logical=False) or 1
    server = ServerProcess(studies, {"threads": threads}, log=folder / "server.log", threads=threads)
    server.start()
    try:
        client = LabelClient(server.url)
        for path in labels:
            image = nib.load(path)
            assert isinstance(image, nib.Nifti1Image)
            label = to_nifti(np.asarray(image.dataobj).astype(np.uint8), np.asarray(image.affine))
            client.save(path.name.removesuffix(".nii.gz"), label, {"whole": True})
        together, apart, waits = [], [], []
        for seed in (1, 2):
            began = time.time()
            client.train(BUNDLE, {"members": MEMBERS, "steps": STEPS, "seed": seed})
            together.append(time.time() - began)
            waits.append(client.info()["patchwise"]["training"][BUNDLE]["started"] - began)
            began = time.time()
            for member in range(MEMBERS):
                client.train(BUNDLE, {"members": 1, "steps": STEPS, "seed": 100 * seed + member})
            apart.append(time.time() - began)
    finally:
        server.stop()
    yield row(f"training {MEMBERS} members of {STEPS} steps", _median(together), _median(apart), 1.2)
    yield row("first step after the call", _median(waits), FIRST_STEP_SECONDS, 1.0)


def _median(values: list[float]) -> float:
    return statistics.median(values)
