# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval bench large`: a CT of 512 x 512 x 600 with 15 classes and 5 members is scored by the real server.

Environment: SLICES (600), CLASSES (15), MEMBERS (5). The memory is the highest that the scoring's process ever held, as
the kernel keeps it.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
from numpy.typing import NDArray

from eval.benchmarks import Row
from eval.benchmarks.rounds import BUNDLE
from eval.benchmarks.timing import row
from eval.runner.client import LabelClient
from eval.runner.server import ServerProcess

BAR_MIB = 8192.0
ACROSS = 512
PATCH = [96, 96, 96]
SPACING = (0.8, 0.8, 1.0)


def run() -> Iterator[Row]:
    """Rows of the peak memory of the scoring, and of the server for a query and a segmentation afterwards."""
    slices, classes, members = (
        int(os.environ.get(k, v)) for k, v in (("SLICES", 600), ("CLASSES", 15), ("MEMBERS", 5))
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        label = make_scan(folder / "studies", slices, classes)
        names = ",".join(f"organ_{c}" for c in range(1, classes + 1))
        conf = {"models": BUNDLE, "labels": names, "members": members, "methods": "power_pe"}
        server = ServerProcess(folder / "studies", conf, log=folder / "server.log", threads=os.cpu_count() or 1)
        server.start()
        try:
            client = LabelClient(server.url)
            _annotate(server.url, label, classes, slices)
            client.train(BUNDLE, {"steps": 1, "patch": PATCH, "batch": 1})
            client.close()
            yield from _rows(server, f"{ACROSS} x {ACROSS} x {slices}, {classes} classes, {members} members")
        finally:
            server.stop()


def _rows(server: ServerProcess, scan: str) -> Iterator[Row]:
    """Each row as it is measured, the one that takes longest at the end."""
    assert server.process
    began = time.perf_counter()
    peak = _scoring_peak(server)
    seconds = round(time.perf_counter() - began)
    yield {**row(f"peak memory of scoring {scan}", peak, BAR_MIB, 1.0), "unit": "MiB", "seconds": seconds}
    asked = {"client_id": "ann", "size": [64, 64, 64], "stride": [16, 16, 16]}
    reply = httpx.post(f"{server.url}/activelearning/power_pe", json=asked, timeout=3600)
    found = {"unit": "MiB", "regions": len(reply.raise_for_status().json()["regions"])}
    asking = _highest(server.process.pid)
    yield {**row(f"peak memory of the server, next region after {scan}", asking, BAR_MIB, 1.0), **found}
    began = time.perf_counter()
    _segment(server.url)
    inferring, seconds = _highest(server.process.pid), round(time.perf_counter() - began)
    found = {"unit": "MiB", "seconds": seconds}
    yield {**row(f"peak memory of the server, segmentation of {scan}", inferring, BAR_MIB, 1.0), **found}


def _annotate(url: str, label: bytes, classes: int, slices: int) -> None:
    """Answer a corner of the scan; the rest stays in the pool."""
    region = {"image": "ct", "start": [128, 128, 0], "size": [160, 160, slices]}
    with httpx.Client(base_url=url, timeout=600) as http:
        asked = {"batch": 1, "regions": [region], "client_id": "ann"}
        (query,) = http.post("/activelearning/precomputed", json=asked).raise_for_status().json()["regions"]
        told = {"queries": [query["query"]], "client_id": "ann"}
        http.put(
            "/datastore/label",
            params={"image": "ct", "tag": "final"},
            data={"params": json.dumps({**told, "label_info": _info(classes)})},
            files={"label": ("ct.nii.gz", label, "application/gzip")},
        ).raise_for_status()


def _segment(url: str) -> None:
    """Request the segmentation of the scan, as viewers do; the file is not read."""
    with httpx.stream(
        "POST", f"{url}/infer/{BUNDLE}", params={"image": "ct", "output": "image"}, timeout=None
    ) as reply:
        reply.raise_for_status()
        for _ in reply.iter_raw():
            pass


def make_scan(studies: Path, slices: int, classes: int) -> bytes:
    """Write a body with as many ellipsoids as classes, in Hounsfield units; return the file of their label."""
    studies.mkdir()
    x, y, z = np.ogrid[:ACROSS, :ACROSS, :slices]
    rng = np.random.default_rng(0)
    image_xyz = np.full((ACROSS, ACROSS, slices), -1000, np.int16, order="F")
    image_xyz[((x - 256) / 220) ** 2 + ((y - 256) / 160) ** 2 + 0 * z < 1] = 30
    label_xyz = np.zeros(image_xyz.shape, np.uint8, order="F")
    for c in range(1, classes + 1):
        centre = (rng.uniform(120, 390), rng.uniform(170, 340), rng.uniform(0.1, 0.9) * slices)
        radii = rng.uniform(12, 45, 3)
        inside = sum(((a - m) / r) ** 2 for a, m, r in zip((x, y, z), centre, radii, strict=True)) < 1
        label_xyz[inside], image_xyz[inside] = c, 40 + 12 * c
    _texture(image_xyz, rng)
    affine = np.diag([*SPACING, 1.0])
    _write(studies / "ct.nii.gz", image_xyz, affine)
    return gzip.compress(nib.Nifti1Image(label_xyz, affine).to_bytes(), 1)


def _texture(image_xyz: NDArray[np.int16], rng: np.random.Generator) -> None:
    """Noise of 12 HU, one slice at a time, so that the scan compresses like a real one."""
    for k in range(image_xyz.shape[2]):
        image_xyz[:, :, k] += rng.normal(0, 12, image_xyz.shape[:2]).astype(np.int16)


def _write(path: Path, image_xyz: NDArray[np.int16], affine: NDArray[np.float64]) -> None:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(nib.Nifti1Image(image_xyz, affine).to_bytes())


def _info(classes: int) -> list[dict[str, object]]:
    return [{"name": f"organ_{c}", "idx": c} for c in range(1, classes + 1)]


def _scoring_peak(server: ServerProcess) -> float:
    """Peak memory of the scoring's process in MiB, polled until it has ended."""
    assert server.process
    httpx.post(f"{server.url}/scoring/predictive_entropy", json={}, timeout=60).raise_for_status()
    peak = 0.0
    while True:
        children = psutil.Process(server.process.pid).children(recursive=True)
        peak = max([peak, *(_highest(child.pid) for child in children)])
        task = httpx.get(f"{server.url}/scoring/", timeout=600).json()
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            if task["status"] != "DONE":
                raise RuntimeError(f"the scoring ended with {task['status']}: {task.get('details', [])[-5:]}")
            return peak
        time.sleep(0.5)


def _highest(pid: int) -> float:
    """Peak of the resident memory in MiB, as the kernel keeps it; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
