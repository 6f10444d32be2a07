# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval bench load`: half an hour of annotators, trainings and scorings on one server; then a pool of 10,000.

Environment: MINUTES (30), IMAGES (2000), CASES (300, different scans among them, which determine the scoring time),
MANY (10000), THINK (10, the most seconds between two steps of an annotator). MINUTES=0 or MANY=0 leaves that part out.
Memory and file handles are those of the server's own process: trainings and scorings end and give theirs back.
While one connection to its file is open, SQLite keeps the descriptors of closed ones for later use. The descriptors of
the ledger are therefore counted separately: their limit is the number of concurrent requests, and no other count may
grow.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from eval.benchmarks import Row
from eval.benchmarks.latency import ANNOTATORS, CLASSES, Annotators, Times, make_pool, submit
from eval.benchmarks.rounds import BUNDLE
from eval.benchmarks.timing import row
from eval.runner.client import LabelClient
from eval.runner.server import ServerProcess

GROWTH_BAR = 1.05
START_BAR, NEXT_BAR = 10.0, 0.200
_SAMPLE_SECONDS = 5.0
_LEDGER = "ledger.sqlite"
# The annotators, the client that polls /info, the rounds, and the connection that stays open.
_CONNECTIONS = ANNOTATORS + 3
_METHOD = "power_pe"
# So few regions and so many steps that a training or a scoring is at work most of the time.
_BATCH, _STEPS = 100, 2000
_ASKS = 60


@dataclass
class Samples:
    """Resources of the server's process, every few seconds: (seconds, bytes, open files, of them the ledger's)."""

    taken: list[tuple[float, int, int, int]] = field(default_factory=list)

    def watch(self, pid: int, over: threading.Event) -> None:
        """Sample until stopped."""
        process, began = psutil.Process(pid), time.monotonic()
        while not over.wait(_SAMPLE_SECONDS):
            files, ledger = process.num_fds(), sum(Path(f.path).name == _LEDGER for f in process.open_files())
            self.taken.append((time.monotonic() - began, process.memory_info().rss, files, ledger))

    def growth(self, of: Callable[[Any], Any]) -> tuple[float, float]:
        """`of` the samples of the last tenth of the time and of the second: start-up only fills caches."""
        values = np.array(self.taken)
        seconds = values[:, 0] / values[-1, 0]
        early, late = (seconds >= 0.1) & (seconds < 0.2), seconds >= 0.9
        return float(of(values[late])), float(of(values[early]))


def run() -> Iterator[Row]:
    """Rows of latencies, memory and handles, and of a start with 10,000 images."""
    minutes = float(os.environ.get("MINUTES", 30))
    images, many = int(os.environ.get("IMAGES", 2000)), int(os.environ.get("MANY", 10_000))
    # Half an hour of eight annotators leaves some of 2,000 images unasked.
    os.environ.setdefault("THINK", "10")
    if minutes:
        with tempfile.TemporaryDirectory() as name:
            yield from _under_load(Path(name), images, minutes)
    if many:
        with tempfile.TemporaryDirectory() as name:
            yield from _large_pool(Path(name), many)


def _under_load(folder: Path, images: int, minutes: float) -> Iterator[Row]:
    labels = make_pool(folder, images, int(os.environ.get("CASES", 300)))
    train = json.dumps({"members": 2, "steps": _STEPS, "patch": [24, 24, 24]})
    rounds = {"auto_rounds": "true", "auto_method": _METHOD, "auto_train": train}
    conf = {**rounds, "batch": _BATCH, "stop_batches": 50, "threads": 1}
    server = ServerProcess(folder / "studies", conf, log=folder / "server.log", threads=1)
    server.start()
    times, samples, over = Times(), Samples(), threading.Event()
    assert server.process
    watch = threading.Thread(target=samples.watch, args=(server.process.pid, over), daemon=True)
    try:
        _first_round(server.url, labels)
        watch.start()
        with Annotators(server.url, labels, times, _METHOD, waits=True) as people:
            people.start(1_000_000)
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                time.sleep(1)
                people.check()
        facts = httpx.get(f"{server.url}/info/", timeout=60).json()["patchwise"]
    finally:
        over.set()
        server.stop()
    told = sum(people.steps.values())
    work = {step: round(people.steps[step] / told, 3) for step in ("train", "score", "plan")}
    where = f", {minutes:g} minutes, {images} images, {ANNOTATORS} annotators, rounds"
    yield from times.rows(where)
    late, early = samples.growth(lambda taken: np.median(taken[:, 1]) / 2**20)
    grown = row(f"memory at the end against the start{where}", late, GROWTH_BAR * early, 1.0)
    yield {**grown, "unit": "MiB", "rounds": facts["model"]["round"], **work}
    # Each running request holds a connection, so leaked ones are counted between requests.
    late, early = samples.growth(lambda taken: np.min(taken[:, 2] - taken[:, 3]))
    yield {**row(f"open files at the end against the start{where}", late, early, 1.0), "unit": "files"}
    late, early = samples.growth(lambda taken: np.max(taken[:, 3]))
    kept = row(f"descriptors of the ledger at the end{where}", late, _CONNECTIONS, 1.0)
    yield {**kept, "unit": "files", "at_the_start": early, **facts["queries"]}


def _first_round(url: str, labels: dict[str, bytes]) -> None:
    """Train a model and score the pool, so that regions are selected by uncertainty from the beginning."""
    client = LabelClient(url)
    for image in list(labels)[:4]:
        client.save(image, labels[image], {"whole": True, "label_info": CLASSES})
    # From here on rounds run by themselves: scored and planned now, trained when the batch is answered.
    client.train(BUNDLE, {"steps": 20})
    deadline = time.monotonic() + 600
    while not (client.info()["patchwise"]["queries"].get("proposed") and client.info()["patchwise"]["model"]):
        if time.monotonic() > deadline:
            raise RuntimeError("no batch was planned within ten minutes")
        time.sleep(2)
    client.close()


def _large_pool(folder: Path, images: int) -> Iterator[Row]:
    labels = make_pool(folder, images)
    server = ServerProcess(folder / "studies", {"members": 1, "threads": 1}, log=folder / "server.log", threads=1)
    # A new folder is read once; later starts determine the waiting time of a hospital.
    starts = []
    for _ in range(4):
        began = time.perf_counter()
        server.start()
        starts.append(time.perf_counter() - began)
        _wait_until_read(server.url)
        if len(starts) < 4:
            server.stop()
    try:
        client = LabelClient(server.url)
        for image in list(labels)[:4]:
            client.save(image, labels[image], {"whole": True, "label_info": CLASSES})
        client.train(BUNDLE, {"steps": 20})
        client.score("predictive_entropy", {})
        client.close()
        # A region may be all of an image, so a small pool would be used up.
        asks = min(_ASKS, images // 4)
        times = {method: list(_asked(server.url, labels, method, asks)) for method in ("random", "power_pe")}
    finally:
        server.stop()
    yield {
        **row(f"start, {images} images", float(np.median(starts[1:])), START_BAR, 1.0),
        "first_s": round(starts[0], 2),
    }
    for method, taken in times.items():
        yield row(f"next region by {method}, {images} images: p95", float(np.percentile(taken, 95)), NEXT_BAR, 1.0)


def _wait_until_read(url: str) -> None:
    """Until a first region is found, which needs the grid of every image."""
    httpx.post(f"{url}/activelearning/random", json={"client_id": "first"}, timeout=600).raise_for_status()


def _asked(url: str, labels: dict[str, bytes], method: str, asks: int) -> Iterator[float]:
    """Seconds of each next region while one annotator works, after a first one that fills caches."""
    with httpx.Client(base_url=url, timeout=600) as http:
        http.post(f"/activelearning/{method}", json={"client_id": "first"}).raise_for_status()
        for _ in range(asks):
            began = time.perf_counter()
            reply = http.post(f"/activelearning/{method}", json={"client_id": "ann"}).raise_for_status()
            yield time.perf_counter() - began
            (region,) = reply.json()["regions"]
            image = region["image"]
            submit(http, image, labels[image], {"queries": [region["query"]], "client_id": "ann"})
