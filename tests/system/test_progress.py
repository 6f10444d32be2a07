# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Rounds that run themselves and the progress page, on a real server and in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Watched, started_browser
from tests.system.conftest import Client, Start, fill

HOSTILE = '<img src=x onerror="document.title=1"> & co'
TINY = json.dumps({"members": 1, "steps": 3, "patch": [16, 16, 16], "batch": 2})


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("progress") / "studies"
    fill(folder, phantoms, 3)
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, studies: Path) -> Client:
    conf = {"batch": 3, "size": "10,10,10", "auto_rounds": "true", "auto_method": "power_pe", "auto_train": TINY}
    return start_server(studies, budget_minutes=30, **conf)[1]


def progress(client: Client) -> dict[str, Any]:
    reply = client.http.get("/patchwise/progress")
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_for(client: Client, ready: Callable[[dict[str, Any]], Any], seconds: float = 240) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = progress(client)
        if ready(found):
            return found
        time.sleep(0.5)
    raise AssertionError(f"not reached: {json.dumps(found, indent=1)[:4000]}")


def answer_batch(client: Client, method: str, who: str, early: str | None = None) -> list[dict[str, Any]]:
    """Request and answer single regions, as Slicer does, until the batch is done.

    `early` requests a region while the last one is open."""
    done = []
    for number in range(3):
        region = client.ask(method, client_id=who).json()["regions"][0]
        if early is not None and number == 2:
            assert client.ask(method, client_id=early).json()["regions"]
        assert client.submit(region["image"], queries=[region["query"]], client_id=who).status_code == 200
        done.append(region)
    return done


@pytest.mark.slow
def test_an_answered_batch_leads_to_the_next_one(client: Client) -> None:
    # A client with a method that needs a model first gets a random batch.
    first = answer_batch(client, "predictive_entropy", "ann")
    assert {(r["method"], r["round"]) for r in first} == {("random", 0)}
    found = wait_for(client, lambda p: p["regions"]["planned"] == 3)
    assert found["work"]["model"]["round"] == 0
    assert found["failures"] == []
    # With any method, the client gets the planned regions.
    # Requests after the last region of the batch return others, for which the round does not wait.
    second = answer_batch(client, "random", HOSTILE, early="eve")
    # Until the new model has scored the pool, other clients get the regions planned before.
    wait_for(client, lambda p: p["work"]["step"] == "score")
    reply = client.ask("bald", client_id="fay")
    assert [(r["method"], r["round"]) for r in reply.json()["regions"]] == [("random", 1)], reply.text
    assert {(r["method"], r["round"]) for r in second} == {("power_pe", 1)}
    found = wait_for(
        client, lambda p: p["quality"]["batches"] and p["regions"]["planned"] == 3 and p["work"]["model"]["round"] == 1
    )
    assert found["work"]["model"]["round"] == 1
    (batch,) = found["quality"]["batches"]
    assert (batch["round"], batch["regions"], batch["known"], batch["methods"]) == (1, 3, 3, ["power_pe"])
    assert 0 <= batch["low"] <= batch["dice"] <= batch["high"] <= 1
    assert found["quality"]["advice"]["verdict"] == "too early to say"
    assert found["voxels"] == sum(c["voxels"] for c in found["classes"]) == 6000
    assert {(p["client"], p["answered"], p["voxels"]) for p in found["annotators"]} == {
        ("ann", 3, 3000),
        (HOSTILE, 3, 3000),
        ("eve", 0, 0),
        ("fay", 0, 0),
    }
    # The batch is there before the planning that made it has been looked at.
    wait_for(client, lambda p: p["work"]["step"] == "wait")
    assert client.http.get("/info/").json()["patchwise"]["rounds"] == {"step": "wait", "failure": None}


@pytest.mark.slow
def test_a_failed_training_is_told_and_annotation_goes_on(client: Client, studies: Path) -> None:
    planned = [client.ask("random", client_id="ben").json()["regions"][0] for _ in range(3)]
    for region in planned[:2]:
        assert client.submit(region["image"], queries=[region["query"]], client_id="ben").status_code == 200
    assert client.submit(planned[2]["image"], queries=[planned[2]["query"]], client_id="ben").status_code == 200
    label = next((studies / "labels" / "final").glob("*.nii.gz"))
    label.write_bytes(b"not a label any more")
    # A training would rebuild the label, but a raw answer differs from its submission.
    raw = next((studies / ".patchwise" / "raw" / label.name.removesuffix(".nii.gz")).iterdir())
    whole = raw.read_bytes()
    raw.write_bytes(whole[:-1])
    found = wait_for(client, lambda p: p["failures"] and p["failures"][0]["retry_at"])
    (failure,) = found["failures"]
    assert failure["what"] == "training"
    assert raw.name in failure["sentence"]
    assert failure["retry_at"] > failure["at"]
    told = client.http.get("/info/").json()["patchwise"]
    assert raw.name in told["rounds"]["failure"]["sentence"]
    assert told["model"]["round"] == 1
    # The last good model stays in use and serves requests in the meantime.
    assert client.ask("power_pe", client_id="ben").json()["regions"][0]["round"] == 2
    raw.write_bytes(whole)
    found = wait_for(client, lambda p: p["work"]["model"]["round"] == 2 and not p["failures"])
    assert client.http.get("/info/").json()["patchwise"]["rounds"]["failure"] is None


@pytest.mark.slow
def test_a_server_killed_while_it_trains_carries_on(start_server: Start, tmp_path: Path, phantoms: Path) -> None:
    fill(tmp_path / "studies", phantoms, 2)
    conf = {"batch": 3, "size": "10,10,10", "auto_rounds": "true", "auto_method": "bald", "auto_train": TINY}
    server, client = start_server(tmp_path / "studies", **conf)
    answer_batch(client, "random", "ann")
    wait_for(client, lambda p: p["work"]["training"]["running"])
    # As a crash would; starting anew also ends the training that was left behind.
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server.start()
    found = wait_for(client, lambda p: p["regions"]["planned"] == 3)
    assert (found["work"]["model"]["round"], found["failures"]) == (0, [])
    assert client.ask("random").json()["regions"][0]["method"] == "bald"


@pytest.mark.usefixtures("chromium")
def test_the_page_shows_it(client: Client, studies: Path) -> None:
    shutil.copy(next(studies.glob("*.nii.gz")), studies / f"{HOSTILE}.nii.gz")
    chosen = client.ask("precomputed", client_id=HOSTILE, batch=1,
                        regions=[{"image": HOSTILE, "start": [0, 0, 0], "size": [10, 10, 10]}])  # fmt: skip
    assert chosen.status_code == 200, chosen.text
    found = wait_for(client, lambda p: not p["measuring"] and any(HOSTILE in r["cue"] for r in p["latest"]))
    url = str(client.http.base_url)
    with started_browser() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        watched = Watched(page)
        page.goto(f"{url}/patchwise/")
        page.wait_for_selector("#verdict", state="attached")
        assert "Too early to say" in page.inner_text("body")
        assert f"{found['regions']['answered']}" in page.inner_text("#tiles")
        assert "anterior" in page.inner_text("#classes")
        assert HOSTILE in page.inner_text("#people")
        assert HOSTILE in page.inner_text("#latest")
        assert page.locator("#curve circle").count() == len(found["quality"]["batches"])
        page.wait_for_function("[...document.images].length && [...document.images].every(i => i.naturalWidth)")
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert all(r.startswith((url, f"blob:{url}", "data:", "about:")) for r in watched.requests), watched.requests
        assert watched.errors == []
