# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Eight annotators at once, on a server that may be killed: every region is answered once, nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest

from eval.app_tools.audit import audit
from eval.runner.server import ServerProcess
from tests.system.conftest import BUNDLE, Client, Start, fill

UNLABELLED = 255
CLIENTS = 8
SIZE = (4, 4, 4)


def plan(studies: Path, count: int) -> list[dict[str, Any]]:
    """Disjoint regions, in turn from every image."""
    found = []
    shapes = {p.name[:-7]: nib.load(p).shape for p in sorted(studies.glob("*.nii.gz"))}
    grids = {name: [np.arange(n // s) * s for n, s in zip(shape, SIZE, strict=True)] for name, shape in shapes.items()}
    for x in range(len(shapes) * count):
        name = list(shapes)[x % len(shapes)]
        counts = tuple(len(axis) for axis in grids[name])
        place = x // len(shapes)
        if place < np.prod(counts):
            start = [int(axis[i]) for axis, i in zip(grids[name], np.unravel_index(place, counts), strict=True)]
            found.append({"image": name, "start": start, "size": list(SIZE)})
    return found[:count]


class Annotator(threading.Thread):
    """Request and answer one region after the other until stopped; wait for a server that is down."""

    def __init__(self, name: str, url: str, phantoms: Path, done: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.client = Client(url, phantoms)
        self.done = done
        self.given: list[int] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.done.is_set():
            try:
                reply = self.client.ask("precomputed", client_id=self.name)
                if reply.status_code == 200 and reply.json():
                    self._answer(reply.json()["regions"][0])
                else:
                    # No region is free at the moment: others hold the remaining ones.
                    time.sleep(0.2)
            except httpx.TransportError:
                time.sleep(0.2)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def _answer(self, region: dict[str, Any]) -> None:
        self.given.append(region["query"])
        while not self.done.is_set():
            try:
                status = self.client.http.get(f"/patchwise/queries/{region['query']}").json()
                if status["status"] != "open" or status["client"] != self.name:
                    return
                reply = self.client.submit(region["image"], queries=[region["query"]], client_id=self.name)
                assert reply.status_code == 200, reply.text
                return
            except httpx.TransportError:
                time.sleep(0.2)


def work_through(
    server: ServerProcess, client: Client, studies: Path, count: int, kills: int, seconds: float
) -> list[Annotator]:
    regions = plan(studies, count)
    planned = client.ask("precomputed", batch=count, regions=regions, client_id="planner", lease_minutes=1e-4)
    assert len(planned.json()["regions"]) == count
    time.sleep(0.1)
    done, rng = threading.Event(), np.random.default_rng(0)
    people = [Annotator(f"ann{i}", server.url, client.phantoms, done) for i in range(CLIENTS)]
    for person in people:
        person.start()
    deadline = time.monotonic() + seconds
    answered, before = 0, 0
    while answered < count:
        assert time.monotonic() < deadline, f"{answered} of {count} regions answered"
        assert not any(person.failures for person in people), [person.failures for person in people]
        time.sleep(0.5)
        answered = httpx.get(f"{server.url}/info/", timeout=60).json()["patchwise"]["queries"].get("answered", 0)
        if kills and answered - before > count // 8:
            kills, before = kills - 1, answered
            trainer = training(server)
            time.sleep(float(rng.uniform(0, 1)))
            if kills % 2:
                trainer.kill()
                continue
            assert server.process
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server.start()
    done.set()
    for person in people:
        person.join(timeout=60)
    return people


def training(server: ServerProcess) -> psutil.Process:
    """The process of a training on the present answers; started unless one is running."""
    deadline = time.monotonic() + 60
    assert server.process
    while time.monotonic() < deadline:
        for child in psutil.Process(server.process.pid).children(recursive=True):
            if child.is_running() and "train" in child.cmdline():
                return child
        request = {"members": 1, "steps": 100_000, "patch": [16, 16, 16]}
        httpx.post(f"{server.url}/train/{BUNDLE}", json=request, timeout=60)
        time.sleep(0.5)
    raise AssertionError("no training started within a minute")


def check(client: Client, studies: Path, count: int) -> None:
    answers = [a for a in client.http.get("/patchwise/answers").json() if a["active"]]
    assert sorted(query for a in answers for query in a["queries"]) == list(range(1, count + 1))
    for answer in answers:
        assert (studies / ".patchwise" / "raw" / answer["raw"]).is_file()
    labelled = 0
    for path in (studies / "labels" / "final").glob("*.nii.gz"):
        label = np.asarray(nib.load(path).dataobj)
        truth = np.asarray(nib.load(client.phantoms / "labelsTr" / path.name).dataobj)
        mask = label != UNLABELLED
        assert np.array_equal(label[mask], truth[mask])
        labelled += int(mask.sum())
    assert labelled == count * int(np.prod(SIZE))
    assert audit(studies).problems == []


@pytest.mark.slow
def test_eight_annotators_answer_every_region_once(start_server: Start, tmp_path: Path, phantoms: Path) -> None:
    count = 64
    fill(tmp_path / "studies", phantoms, count=8)
    server, client = start_server(tmp_path / "studies", size="4,4,4")
    people = work_through(server, client, tmp_path / "studies", count, kills=0, seconds=300)
    check(client, tmp_path / "studies", count)
    given = [query for person in people for query in person.given]
    assert sorted(given) == list(range(1, count + 1))
    assert min(len(person.given) for person in people) > 0
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_annotators_and_killed_servers_and_trainers(start_server: Start, tmp_path: Path, phantoms: Path) -> None:
    count = 500
    fill(tmp_path / "studies", phantoms, count=8)
    # If the server is killed before the response, the holder never learns of its region, which is free after half a
    # minute.
    server, client = start_server(tmp_path / "studies", size="4,4,4", lease_minutes=0.5)
    work_through(server, client, tmp_path / "studies", count, kills=6, seconds=1500)
    check(client, tmp_path / "studies", count)
    server.stop()
