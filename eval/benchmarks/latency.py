# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Waiting times of annotators: eight of them on one server with a large pool, during a training.

The pool consists of hard links to generated scans of about 36 x 50 x 35 voxels, scored by the server itself with a
briefly trained network. Each annotator requests a region as viewers do (without a batch), downloads the image, waits
for about a second and submits a label of the whole grid. Meanwhile /info is polled. Then labels of 512 x 512 x 200 are
saved one at a time, while the others continue with regions that were chosen before. A training runs all the time.

`IMAGES`, `ASKS` (per annotator), `LARGE` (saves) and `THINK` (seconds) in the environment make it smaller.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from eval.benchmarks import Row
from eval.benchmarks.rounds import BUNDLE, phantoms
from eval.benchmarks.timing import row
from eval.runner.client import LabelClient
from eval.runner.server import ServerProcess

ANNOTATORS = 8
CASES = 40
LARGE_SHAPE = (512, 512, 200)
BARS = {"next region": 0.150, "save": 0.250, "info": 0.050, "large save": 1.5}
CLASSES = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


def run() -> Iterator[Row]:
    """Rows of waiting times per kind of request: the 95th percentile against its bar."""
    images, asks, large = (int(os.environ.get(k, v)) for k, v in (("IMAGES", 2000), ("ASKS", 30), ("LARGE", 12)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = make_pool(folder, images)
        server = ServerProcess(folder / "studies", {"members": 2, "threads": 1}, log=folder / "server.log", threads=1)
        server.start()
        try:
            prepare(server.url, labels)
            times = Times()
            with Annotators(server.url, labels, times, "power_pe") as people:
                people.work(asks)
            # The large image has no scores, so no batch can be chosen beside it: the others work on one chosen before.
            plan(server.url, 50 * ANNOTATORS)
            large_label = make_large(folder)
            large_times = Times()
            with Annotators(server.url, labels, Times(), "power_pe") as people:
                people.start(50)
                save_large(server.url, large_label, large, large_times)
        finally:
            server.stop()
    yield from times.rows(f", {images} images, {ANNOTATORS} annotators, training")
    yield from large_times.rows(f" of {' x '.join(map(str, LARGE_SHAPE))}, annotators and training")


class Times:
    """Seconds of every request, by its kind."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def note(self, what: str, began: float) -> None:
        """Add the seconds since `began`; several threads append to the lists."""
        self._taken.setdefault(what, []).append(time.perf_counter() - began)

    def rows(self, where: str) -> Iterator[Row]:
        """A row for each bar that was measured, with the median and the number of requests besides."""
        for what, bar in BARS.items():
            if taken := self._taken.get(what):
                found = row(f"{what}{where}: p95", float(np.percentile(taken, 95)), bar, 1.0)
                yield {**found, "p50_s": round(float(np.median(taken)), 5), "requests": len(taken)}


def make_pool(folder: Path, images: int, cases: int = CASES) -> dict[str, bytes]:
    """Fill `folder/studies`, each of `cases` scans under several names; return the label file of each image."""
    scans, labels = phantoms(folder / "phantoms", min(cases, images))
    studies = folder / "studies"
    studies.mkdir()
    (studies / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "anterior": 1, "posterior": 2}}))
    contents = [path.read_bytes() for path in labels]
    found = {}
    for number in range(images):
        image = f"scan_{number:05d}"
        os.link(scans[number % len(scans)], studies / f"{image}.nii.gz")
        found[image] = contents[number % len(contents)]
    return found


def prepare(url: str, labels: dict[str, bytes]) -> None:
    """A first model, its moments and summaries of the pool, and a training in progress."""
    client = LabelClient(url)
    for image in list(labels)[:4]:
        client.save(image, labels[image], {"whole": True, "label_info": CLASSES})
    client.train(BUNDLE, {"steps": 20})
    client.score("predictive_entropy", {})
    client.close()
    with httpx.Client(base_url=url, timeout=60) as http:
        http.post(f"/train/{BUNDLE}", json={"steps": 1_000_000, "members": 1}).raise_for_status()
        while not any("Engine run" in line for line in http.get("/train/").json().get("details", ())):
            time.sleep(1)


class Annotators:
    """Eight clients in threads, and one that polls /info; all of them end with the block."""

    def __init__(self, url: str, labels: dict[str, bytes], times: Times, method: str, waits: bool = False) -> None:
        self.url, self.labels, self.times, self.method = url, labels, times, method
        # Whether a request may find no region while the next batch is being prepared.
        self._waits = waits
        self._think = float(os.environ.get("THINK", 1))
        self.steps: Counter[str] = Counter()  # of automatic rounds, from /info
        self._over = threading.Event()
        self._failed: list[str] = []
        self._people: list[threading.Thread] = []
        self._watch = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Annotators:
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in (*self._people, self._watch):
            thread.join()

    def start(self, asks: int) -> None:
        """Start all annotators."""
        self._people = [threading.Thread(target=self._annotate, args=(i, asks), daemon=True) for i in range(ANNOTATORS)]
        for thread in self._people:
            thread.start()

    def work(self, asks: int) -> None:
        """Run all annotators until each has requested and answered `asks` regions.

        Raises:
            RuntimeError: a request was refused.
        """
        self.start(asks)
        for thread in self._people:
            thread.join()
        self.check()

    def check(self) -> None:
        """Check that no request was refused so far.

        Raises:
            RuntimeError: a request was refused.
        """
        if self._failed:
            raise RuntimeError(self._failed[0])

    def _annotate(self, number: int, asks: int) -> None:
        me, rng = f"annotator_{number}", np.random.default_rng(number)
        # One connection per request, as in MONAI Label's clients: the server closes an idle one, possibly at the moment
        # of the next request.
        with httpx.Client(base_url=self.url, timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            for _ in range(asks):
                try:
                    self._region(http, me, rng)
                except Exception as error:
                    self._failed.append(f"{me}: {error}")
                    return
                if self._over.is_set():
                    return

    def _region(self, http: httpx.Client, me: str, rng: np.random.Generator) -> None:
        self._over.wait(self._think * float(rng.uniform(0, 1)))
        began = time.perf_counter()
        reply = http.post(f"/activelearning/{self.method}", json={"client_id": me})
        if self._waits and (reply.status_code == 409 or not reply.raise_for_status().json()):
            self._over.wait(2)  # a response without a region is fast and would bias the figure
            return
        self.times.note("next region", began)
        (region,) = reply.raise_for_status().json()["regions"]
        began = time.perf_counter()
        http.get("/datastore/image", params={"image": region["image"]}).raise_for_status()
        self.times.note("download", began)
        self._over.wait(self._think * float(rng.uniform(0, 1)))
        began = time.perf_counter()
        submit(http, region["image"], self.labels[region["image"]], {"queries": [region["query"]], "client_id": me})
        self.times.note("save", began)

    def _poll(self) -> None:
        with httpx.Client(base_url=self.url, timeout=300) as http:
            while not self._over.wait(0.25):
                began = time.perf_counter()
                try:
                    reply = http.get("/info/").raise_for_status()
                except httpx.HTTPError as error:
                    self._failed.append(f"/info: {error}")
                    return
                self.times.note("info", began)
                rounds = reply.json()["patchwise"]["rounds"] or {}
                self.steps[rounds.get("step") or "none"] += 1


def submit(http: httpx.Client, image: str, label: bytes, params: dict[str, Any]) -> None:
    """Save a label as a viewer does."""
    http.put(
        "/datastore/label",
        params={"image": image, "tag": "final"},
        data={"params": json.dumps({"label_info": CLASSES, **params})},
        files={"label": (f"{image}.nii.gz", label, "application/gzip")},
    ).raise_for_status()


def plan(url: str, count: int) -> None:
    """Plan regions for later single-region requests: a client requests them with a lease that expires at once."""
    asked = {"batch": count, "client_id": "planner", "lease_minutes": 1e-4, "n_per_image": 20}
    httpx.post(f"{url}/activelearning/power_pe", json=asked, timeout=300).raise_for_status()


def make_large(folder: Path) -> bytes:
    """Add a large image to the pool; return the file of its label, two bodies in 52 million voxels."""
    x, y, z = np.ogrid[: LARGE_SHAPE[0], : LARGE_SHAPE[1], : LARGE_SHAPE[2]]
    label_xyz = np.zeros(LARGE_SHAPE, np.uint8, order="F")
    for value, centre in ((1, (180, 250, 100)), (2, (330, 250, 100))):
        distance = sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), centre, (70, 90, 60), strict=True))
        label_xyz[distance + 0.05 * np.sin(x / 3.0) * np.sin(y / 4.0) < 1] = value
    image = nib.Nifti1Image(label_xyz.astype(np.int16), np.eye(4))
    path = folder / "large.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes(), 1))
    path.rename(folder / "studies" / path.name)
    return gzip.compress(nib.Nifti1Image(label_xyz, np.eye(4)).to_bytes(), 6)


def save_large(url: str, label: bytes, count: int, times: Times) -> None:
    """Save answers to `count` regions of the large image, one after the other."""
    regions = [{"image": "large", "start": [40 * k, 0, 0], "size": [40, 512, 200]} for k in range(count)]
    with httpx.Client(base_url=url, timeout=300) as http:
        asked = {"batch": count, "regions": regions, "client_id": "large"}
        reply = http.post("/activelearning/precomputed", json=asked).raise_for_status()
        for region in reply.json()["regions"]:
            began = time.perf_counter()
            submit(http, "large", label, {"queries": [region["query"]], "client_id": "large"})
            times.note("large save", began)
