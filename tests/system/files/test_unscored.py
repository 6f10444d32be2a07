# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""New scans without scores do not stop strategies, and the pool is scored by itself."""

from __future__ import annotations

import time

import pytest

from tests.system.files.conftest import BUNDLE, save, scan, truth


def until(what, seconds=90):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


def begun(folder, serve, **conf):
    for number in range(2):
        save(folder / f"s{number}.nii.gz", scan(number))
        save(folder / "labels" / "final" / f"s{number}.nii.gz", truth(scan(number)))
    client = serve(folder, **conf)
    assert client.train().status_code == 200
    return client


def check_session(client):
    """3D Slicer names its volume, which is not an image here, along with the session that holds its scan."""
    path = client.studies / "s0.nii.gz"
    made = client.http.put("/session/", files={"files": ("Volume_1.nii.gz", path.read_bytes())})
    wanted = {"image": "Volume_1", "session_id": made.json()["session_id"], "output": "image"}
    reply = client.http.post(f"/infer/{BUNDLE}", params=wanted, data={"params": "{}"})
    assert reply.status_code == 200, reply.text
    assert client.http.post(f"/infer/{BUNDLE}", params={"image": "Volume_1"}).status_code == 404


def images(reply):
    return {region["image"] for region in reply.json()["regions"]}


def test_without_it_a_query_goes_on_among_the_scored(tmp_path, serve):
    client = begun(tmp_path / "studies", serve, auto_score=False)
    check_session(client)
    asked = client.ask("predictive_entropy", batch=2, size=[6, 6, 6])
    assert asked.status_code == 409
    assert "POST /scoring/predictive_entropy" in asked.json()["detail"]
    assert client.score().status_code == 200
    save(client.studies / "new.nii.gz", scan(7))
    asked = client.ask("predictive_entropy", batch=3, n_per_image=1, size=[6, 6, 6])
    assert asked.status_code == 200, asked.text
    assert images(asked) == {"s0", "s1"}
    assert asked.json()["note"].endswith(
        "1 of 3 images (first: new) have not been scored with the current model, and are left out of this choice"
    )
    assert client.score().json()["computed"] == 1
    assert "new" in images(client.ask("predictive_entropy", batch=3, n_per_image=1, size=[6, 6, 6]))


@pytest.mark.slow
def test_after_a_training_and_for_a_new_scan_the_pool_is_scored_by_itself(tmp_path, serve):
    client = begun(tmp_path / "studies", serve, auto_score=True)
    asked = client.ask("predictive_entropy", batch=2, n_per_image=1, size=[6, 6, 6], request_id="one")
    assert asked.status_code in (200, 409)
    assert asked.status_code == 200 or "ask again in a minute" in asked.json()["detail"]
    until(lambda: client.ask("predictive_entropy", batch=2, n_per_image=1, size=[6, 6, 6]).status_code == 200)
    save(client.studies / "new.nii.gz", scan(7))
    asked = client.ask("predictive_entropy", batch=3, n_per_image=1, size=[6, 6, 6])
    assert asked.status_code == 200, asked.text
    assert "new" in images(asked) or "they are being scored" in asked.json()["note"]
    # Every question leases its regions, so that small ones leave some however often this asks.
    until(lambda: "new" in images(client.ask("power_pe", batch=3, n_per_image=1, size=[1, 1, 1])))
    until(lambda: client.http.get("/patchwise/progress").json()["work"]["scoring"]["waiting"] == 0)
    # A scoring asked for by hand does not wait for an automatic one.
    assert client.train(seed=1, round=1).status_code == 200
    time.sleep(3)
    assert client.score().status_code == 200
