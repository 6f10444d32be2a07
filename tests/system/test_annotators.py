# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Several annotators on one real server: leases, second readings, minutes, and answers taken back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest

from eval.app_tools.audit import audit
from tests.system.conftest import CLASSES, Client, Start, fill

UNLABELLED = 255


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("annotators") / "studies"
    fill(folder, phantoms)
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, studies: Path) -> Client:
    return start_server(studies, batch=4, size="8,8,8", forwarded_header="X-Forwarded-For")[1]


def lease(client: Client, act: str, query: Any, who: str = "ann", **more: Any) -> httpx.Response:
    return client.http.post(f"/activelearning/{act}", json={"query": query, "client_id": who, **more})


def told(client: Client, query: int) -> dict[str, Any]:
    return client.http.get(f"/patchwise/queries/{query}").json()


def one(client: Client, **request: Any) -> dict[str, Any]:
    return client.ask("random", **{"batch": 1, **request}).json()["regions"][0]


def query_region(client: Client, image: str, headers: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
    reply = client.http.post(
        "/infer/query_region",
        params={"image": image, "output": "json"},
        data={"params": json.dumps(params)},
        headers=headers or {},
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


def label_of(studies: Path, region: dict[str, Any]) -> np.ndarray:
    label = np.asarray(nib.load(studies / "labels" / "final" / f"{region['image']}.nii.gz").dataobj)
    return label[tuple(slice(a, a + d) for a, d in zip(region["start"], region["size"], strict=True))]


def test_a_region_is_renewed_released_and_skipped(client: Client) -> None:
    region = one(client, seed=1, lease_minutes=0.5)
    renewed = lease(client, "renew", region["query"])
    assert renewed.status_code == 200, renewed.text
    assert renewed.json()["lease_until"] >= region["lease_until"]
    released = lease(client, "release", region["query"], reason="lunch").json()
    assert (released["status"], released["note"]) == ("released", "lunch")
    other = one(client, seed=2)
    assert lease(client, "skip", other["query"], reason="motion").json()["status"] == "skipped"
    assert told(client, other["query"])["note"] == "motion"


def test_leases_of_others_are_refused_in_a_sentence(client: Client) -> None:
    region = one(client, seed=3)
    for act in ("renew", "release", "skip"):
        foreign = lease(client, act, region["query"], "ben")
        assert foreign.status_code == 409
        assert "held by ann, not by ben" in foreign.json()["detail"]
        assert lease(client, act, 99999).status_code == 404
        wrong = lease(client, act, "all")
        assert wrong.status_code == 400
        assert "query" in wrong.json()["detail"]
    assert client.submit(region["image"], queries=[region["query"]]).status_code == 200
    assert "answered already" in lease(client, "skip", region["query"]).json()["detail"]


def test_working_on_a_region_renews_it_and_counts_minutes(client: Client) -> None:
    began = time.monotonic()
    region = one(client, seed=4, client_id="cleo", lease_minutes=1)
    before = told(client, region["query"])
    assert (before["client"], before["opened"], before["minutes"]) == ("cleo", None, None)
    assert before["handed_out"]
    time.sleep(1.1)
    query_region(client, region["image"], client_id="cleo")
    opened = told(client, region["query"])
    assert opened["opened"] > before["handed_out"]
    assert opened["lease_until"] > before["lease_until"]
    assert 1 / 60 < opened["minutes"] < (time.monotonic() - began) / 60 + 0.01
    assert client.submit(region["image"], client_id="cleo").json()["queries"] == [region["query"]]
    done = told(client, region["query"])
    assert done["submitted"] >= opened["opened"]
    assert done["minutes"] > opened["minutes"]


def test_a_download_of_the_image_opens_its_region(client: Client) -> None:
    region = one(client, seed=5, client_id="dora")
    reply = client.http.get("/datastore/image", params={"image": region["image"]})
    assert reply.content[:2] == b"\x1f\x8b"
    assert told(client, region["query"])["opened"]


def test_clients_without_an_id_are_told_apart_by_address(client: Client, studies: Path) -> None:
    def ask(address: str) -> dict[str, Any]:
        reply = client.http.post("/activelearning/random", json={"batch": 1}, headers={"X-Forwarded-For": address})
        return reply.json()["regions"][0]

    first, second = ask("10.0.0.1"), ask("spoofed, 10.0.0.2")
    assert first["query"] != second["query"]
    assert told(client, first["query"])["client"] == "~anonymous@10.0.0.1"
    assert told(client, second["query"])["client"] == "~anonymous@10.0.0.2"
    shown = query_region(client, second["image"], {"X-Forwarded-For": "10.0.0.2"})["regions"]
    assert second["query"] in [region["query"] for region in shown]
    assert first["query"] not in [region["query"] for region in shown]
    truth = client.phantoms / "labelsTr" / f"{second['image']}.nii.gz"
    with open(truth, "rb") as stream:
        reply = client.http.put(
            "/datastore/label",
            params={"image": second["image"]},
            data={"params": json.dumps({"label_info": CLASSES})},
            files={"label": (truth.name, stream)},
            headers={"X-Forwarded-For": "10.0.0.2"},
        )
    assert reply.json()["queries"] == [second["query"]]
    assert np.all(label_of(studies, second) != UNLABELLED)
    assert told(client, first["query"])["status"] == "open"


def test_a_region_read_twice_tells_how_far_two_people_agree(client: Client, studies: Path, tmp_path: Path) -> None:
    first = one(client, seed=6, double_share=1.0, client_id="eve")
    assert one(client, seed=7, client_id="eve")["start"] != first["start"]
    second = client.ask("random", client_id="finn").json()["regions"][0]
    assert second["query"] != first["query"]
    assert (second["image"], second["start"], second["size"]) == (first["image"], first["start"], first["size"])
    assert client.submit(first["image"], queries=[first["query"]], client_id="eve").status_code == 200
    image = nib.load(studies / f"{first['image']}.nii.gz")
    label = np.zeros(image.shape, np.uint8)
    start, size = first["start"], first["size"]
    label[tuple(slice(a, a + d) for a, d in zip(start, size, strict=True))] = 1
    nib.save(nib.Nifti1Image(label, image.affine), tmp_path / "label.nii.gz")
    saved = client.submit(first["image"], tmp_path / "label.nii.gz", queries=[second["query"]], client_id="finn")
    assert saved.status_code == 200, saved.text
    assert np.all(label_of(studies, first) == 1)
    truth = np.asarray(nib.load(client.phantoms / "labelsTr" / f"{first['image']}.nii.gz").dataobj)
    cut = truth[tuple(slice(a, a + d) for a, d in zip(start, size, strict=True))]
    anterior = int((cut == 1).sum())
    agreement = client.http.get("/patchwise/agreement").json()
    (pair,) = agreement["pairs"]
    assert pair["clients"] == ["eve", "finn"]
    assert pair["classes"]["anterior"]["dice"] == pytest.approx(2 * anterior / (anterior + 512))
    assert pair["classes"]["anterior"]["voxels"] == [anterior, 512]
    assert client.http.get("/info/").json()["patchwise"]["agreement"] == agreement["classes"]


def test_an_answer_is_withdrawn_and_restored(client: Client, studies: Path) -> None:
    region = one(client, seed=8)
    answer = client.submit(region["image"], queries=[region["query"]]).json()["answer"]
    labelled = label_of(studies, region).copy()
    assert np.all(labelled != UNLABELLED)
    withdrawn = client.http.post(f"/patchwise/answers/{answer}/withdraw", json={"client_id": "ann", "reason": "side"})
    assert withdrawn.json()["active"] is False
    path = studies / "labels" / "final" / f"{region['image']}.nii.gz"
    assert not path.exists() or np.all(label_of(studies, region) == UNLABELLED)
    assert told(client, region["query"])["status"] == "expired"
    listed = client.http.get("/patchwise/answers", params={"image": region["image"]}).json()
    assert [a["active"] for a in listed if a["answer"] == answer] == [False]
    again = client.http.post(f"/patchwise/answers/{answer}/withdraw")
    assert (again.status_code, "withdrawn already" in again.json()["detail"]) == (409, True)
    assert client.http.post(f"/patchwise/answers/{answer}/restore").json()["active"] is True
    assert np.array_equal(label_of(studies, region), labelled)
    assert client.http.post("/patchwise/answers/99999/withdraw").status_code == 404


def test_labels_of_a_running_server_pass_the_audit(client: Client, studies: Path) -> None:
    found = audit(studies)
    assert found.problems == []
    assert found.answers >= 5
