# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Submissions for replayed, stale, foreign or unknown queries, and the files that remain at the end."""

from __future__ import annotations

import gzip
import io
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.system.conftest import Client
from tests.system.hostile.helpers import (
    MIB,
    form,
    header,
    image,
    label,
    sentence_of,
    surroundings,
    zeros,
)


@pytest.fixture(scope="module")
def asked(client: Client) -> list[dict[str, Any]]:
    """Two regions that were answered, and two that are open."""
    regions = client.ask("random", batch=4, seed=11).json()["regions"]
    for region in regions[:2]:
        assert client.submit(region["image"], queries=[region["query"]]).status_code == 200
    for region in regions:  # drawn after the reply; a request for the picture waits for it
        assert client.http.get(f"/patchwise/queries/{region['query']}/picture.png").status_code == 200
    return regions


def test_query_ids_that_are_not_these(client: Client, place: Path, asked: list[dict[str, Any]]):
    before = surroundings(place)
    open_one = asked[2]
    other = next(r["image"] for r in asked if r["image"] != open_one["image"])
    # A label of another case lies on another grid, or would be merged into the wrong region.
    reply = client.submit(other, queries=[open_one["query"]])
    assert (reply.status_code, sentence_of(reply)) == (
        400,
        f"query {open_one['query']} asks about {open_one['image']}, but the label is for {other}",
    )
    for queries, sentence in (
        ([999_999], r"there is no query 999999; the answer for .* was not stored"),
        ([-1], r"there is no query -1"),
        ([2**62], r"there is no query 4611686018427387904"),
        ([1.5], r"queries must be a list of query numbers, found \[1.5\]"),
        ("17", r"queries must be a list of query numbers, found '17'"),
        ([True], r"queries must be a list of query numbers"),
    ):
        reply = client.submit(open_one["image"], queries=queries)
        assert reply.status_code == 400, queries
        assert re.search(sentence, sentence_of(reply))
    assert surroundings(place) == before


def test_label_info_of_every_shape(client: Client, place: Path, asked: list[dict[str, Any]]):
    before = surroundings(place)
    region = asked[2]
    for sent in (5, "anterior", [5], [[1]], {"name": "a"}, [{"name": "anterior", "idx": 1e300}], [{"idx": 1}]):
        reply = client.submit(region["image"], queries=[region["query"]], label_info=sent)
        assert reply.status_code == 400, (sent, reply.text)
        assert re.search("label_info", sentence_of(reply)), reply.text
    reply = client.submit(region["image"], queries=[region["query"]], annotated_classes=["nobody"])
    assert (reply.status_code, "annotated_classes must be" in sentence_of(reply)) == (400, True)
    assert surroundings(place) == before


def test_replayed_and_stale_query_ids(client: Client, place: Path, asked: list[dict[str, Any]]):
    """Only the client that answered may answer again, early or late, and the same label has the same effect."""
    region, held = asked[0], asked[3]
    path = {"label": region["image"], "tag": "final"}
    stored = client.http.get("/datastore/label", params=path).content
    assert client.submit(region["image"], queries=[region["query"]]).status_code == 200
    assert np.array_equal(voxels(client.http.get("/datastore/label", params=path).content), voxels(stored))
    before = surroundings(place)
    late = client.submit(region["image"], queries=[region["query"]], client_id="eve")
    assert (late.status_code, sentence_of(late)) == (
        409,
        f"query {region['query']} is answered by ann, not by eve; ask for the next region",
    )
    early = client.submit(held["image"], queries=[held["query"]], client_id="eve")
    assert (early.status_code, "is open by ann, not by eve" in sentence_of(early)) == (409, True)
    assert client.http.post("/activelearning/skip", json={"query": held["query"], "client_id": "ann"}).is_success
    given_up = client.submit(held["image"], queries=[held["query"]])
    assert (given_up.status_code, sentence_of(given_up)) == (
        409,
        f"query {held['query']} is skipped, so it cannot be answered; ask for the next region",
    )
    assert surroundings(place) == before


def voxels(content: bytes) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)


def test_infos_stay_with_images_that_are_there(client: Client, asked: list[dict[str, Any]]):
    reply = client.http.put("/datastore/label/info?label=nobody&tag=final", data={"info": "{}"})
    assert (reply.status_code, "no image 'nobody'" in sentence_of(reply)) == (404, True)
    for info in ("[]", "3", "null"):
        reply = client.http.put(f"/datastore/image/info?image={asked[0]['image']}", data={"info": info})
        assert reply.status_code == 400
        assert sentence_of(reply) == f"info must be a JSON object, found '{info}'"


def test_routes_of_answers_and_leases(client: Client):
    for path, body, status, sentence in (
        ("/activelearning/renew", {"query": 999_999}, 404, "999999"),
        ("/activelearning/renew", {"query": "1"}, 400, "query"),
        ("/activelearning/release", {}, 400, "query: Field required"),
        ("/activelearning/skip", {"query": 1, "reason": "x" * 2000}, 400, "reason"),
        ("/patchwise/answers/999999/withdraw", {}, 404, "999999"),
        ("/patchwise/answers/-1/restore", {}, 404, "-1"),
    ):
        reply = client.http.post(path, json=body)
        assert reply.status_code in (status, 400, 404, 409), (path, reply.text)
        assert sentence in sentence_of(reply)


def test_a_large_honest_label_passes(client: Client, place: Path, tmp_path: Path):
    """512 x 512 x 600 voxels, as a client sends them."""
    shape = (512, 512, 600)
    scan = zeros(header(shape), 150 * MIB)
    (place / "studies" / "large.nii.gz").write_bytes(scan)
    try:
        reply = client.http.put("/datastore/label?image=large", **form(scan, "large.nii.gz", {"whole": True}))
        assert reply.status_code == 200, reply.text
        assert reply.json()["labelled_voxels"] == 512 * 512 * 600
    finally:
        for answer in client.http.get("/patchwise/answers?image=large").json():
            client.http.post(f"/patchwise/answers/{answer['answer']}/withdraw", json={})
        (place / "studies" / "large.nii.gz").unlink()


def test_nothing_is_left_in_the_temporary_folder(client: Client, place: Path, phantoms: Path):
    """After all that: uploads that were taken and uploads that were refused."""
    name = image(phantoms)
    assert client.http.post(f"/infer/query_region?image={name}").status_code == 200
    client.http.put(f"/datastore/label?image={name}&tag=original", **form(label(phantoms)))
    archive = client.http.get("/datastore/dataset")
    assert archive.status_code == 200
    assert zipfile.is_zipfile(io.BytesIO(archive.content))
    deadline = time.monotonic() + 5

    def left() -> list[str]:
        return sorted({path.name for path in (place / "tmp").iterdir()} - set(client.at_start))  # type: ignore

    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []
