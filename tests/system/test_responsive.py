# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A busy server responds to annotators, and all concurrent submissions are kept."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from eval.app_tools.audit import audit
from tests.system.conftest import BUNDLE, Client, Start, fill

UNLABELLED = 255


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("responsive") / "studies"
    fill(folder, phantoms)
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, studies: Path) -> Client:
    return start_server(studies, members=1, batch=4, size="12,12,12")[1]


def test_clients_that_save_one_image_at_once_lose_nothing(client: Client, studies: Path) -> None:
    image = sorted(studies.glob("*.nii.gz"))[0].name[:-7]
    shape = nib.load(studies / f"{image}.nii.gz").shape
    size = [shape[0] // 6, *shape[1:]]
    replies: dict[str, tuple[int, httpx.Response]] = {}

    def work(number: int) -> None:
        me, mine = f"ann{number}", Client(str(client.http.base_url), client.phantoms)
        region = {"image": image, "start": [number * size[0], 0, 0], "size": size}
        (asked,) = mine.ask("precomputed", batch=1, regions=[region], client_id=me).json()["regions"]
        ready.wait()
        replies[me] = asked["query"], mine.submit(image, queries=[asked["query"]], client_id=me)

    ready = threading.Barrier(6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 6
    for query, reply in replies.values():
        assert reply.status_code == 200, reply.text
        # Every response concerns the client's own submission.
        assert reply.json()["queries"] == [query]
    label = np.asarray(nib.load(studies / "labels" / "final" / f"{image}.nii.gz").dataobj)
    truth = np.asarray(nib.load(client.phantoms / "labelsTr" / f"{image}.nii.gz").dataobj)
    stop = 6 * size[0]
    assert np.array_equal(label[:stop], truth[:stop])
    assert np.all(label[stop:] == UNLABELLED)
    assert audit(studies).problems == []


def test_clients_that_ask_at_once_get_regions_of_their_own(client: Client) -> None:
    got: list[dict[str, object]] = []

    def work(number: int) -> None:
        mine = Client(str(client.http.base_url), client.phantoms)
        for _ in range(3):
            got.extend(mine.ask("random", client_id=f"asker{number}", seed=2).json()["regions"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 15
    assert len({region["query"] for region in got}) == 15


# The tests below ask for what this one scores.
def test_a_scoring_prepares_the_first_queries(client: Client, studies: Path) -> None:
    assert client.train(members=1, steps=5, patch=[16, 16, 16])["status"] == "DONE"
    scored = client.http.post("/scoring/predictive_entropy", params={"run_sync": "true"}, json={}).json()
    assert (scored["computed"], scored["prepared"]) == (6, ["clasp_pe", "power_pe", "predictive_entropy"])
    (kept,) = (studies / ".patchwise" / "moments").glob("*/summaries.sqlite")

    def count() -> list[tuple[str, int]]:
        with sqlite3.connect(kept) as connection:
            return connection.execute("SELECT key, COUNT(*) FROM summaries GROUP BY key").fetchall()

    before = count()
    assert [images for _, images in before] == [6, 6, 6]
    for method in scored["prepared"]:
        assert client.ask(method, client_id=method).json()["regions"]
    assert count() == before


def test_a_training_inside_of_the_server_holds_up_nobody(client: Client) -> None:
    ended = threading.Event()

    def train() -> None:
        request = {"members": 1, "steps": 120, "patch": [16, 16, 16], "seed": 7}
        reply = client.http.post(f"/train/{BUNDLE}", params={"run_sync": "true"}, json=request)
        ended.set()
        assert reply.status_code == 200, reply.text

    thread = threading.Thread(target=train)
    thread.start()
    mine = Client(str(client.http.base_url), client.phantoms)
    for _ in range(3):
        assert mine.http.get("/info/").status_code == 200
        (region,) = mine.ask("power_pe", client_id="ben").json()["regions"]
        assert mine.http.get("/datastore/image", params={"image": region["image"]}).status_code == 200
        assert mine.submit(region["image"], queries=[region["query"]], client_id="ben").status_code == 200
    assert not ended.is_set()
    thread.join()
    assert ended.is_set()
