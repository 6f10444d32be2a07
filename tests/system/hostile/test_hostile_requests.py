# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Names that lead elsewhere, JSON that no program should see, tasks that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import BUNDLE, Client
from tests.system.hostile.helpers import (
    MIB,
    OUTSIDE,
    UID,
    image,
    sentence_of,
    surroundings,
)

TRAVERSAL = [
    ("GET", "/datastore/image", {"image": OUTSIDE}, r"image '../../outside' cannot be used; an id has up to 200"),
    ("HEAD", "/datastore/image", {"image": "/etc/passwd"}, None),
    ("GET", "/datastore/image/info", {"image": "..\\outside"}, r"image .* cannot be used"),
    ("DELETE", "/datastore/image", {"id": OUTSIDE}, r"id '../../outside' cannot be used"),
    ("GET", "/datastore/label", {"label": OUTSIDE, "tag": "final"}, r"label '../../outside' cannot be used"),
    ("GET", "/datastore/label", {"label": "a", "tag": "../.."}, r"tag '../..' cannot be used; use up to 200 letters"),
    ("DELETE", "/datastore/label", {"id": "a", "tag": "/tmp"}, r"tag '/tmp' cannot be used"),
    ("GET", "/datastore/label/info", {"label": "a", "tag": "x" * 300}, r"tag 'x+' cannot be used"),
    ("GET", "/datastore/image", {"image": "x" * 5000}, r"image 'x+' cannot be used"),
    ("GET", "/datastore/image", {"image": "a\0b"}, r"parameter 'image' 'a\\x00b' cannot be used; send up to"),
    ("GET", "/datastore/image", {"image": "кот‮gpj"}, r"parameter 'image' .* cannot be used"),
    ("POST", "/infer/query_region", {"image": "/etc/passwd"}, r"image '/etc/passwd' cannot be used"),
    ("POST", "/infer/query_region", {"session_id": "../../studies"}, r"session_id '../../studies' cannot be used"),
    ("POST", f"/infer/{BUNDLE}", {"image": OUTSIDE}, r"image '../../outside' cannot be used"),
    ("GET", "/session/%2e%2e", {}, r"path '/session/..' cannot be used; write it without"),
    ("DELETE", "/session/%2e%2e", {}, r"path '/session/..' cannot be used"),
    ("GET", "/session/..%5c..", {}, r"path .* cannot be used; write it without control"),
    ("GET", "/model/..%2f..%2fetc%2fpasswd", {}, r"path '/model/../../etc/passwd' cannot be used"),
    ("GET", "/model/info/%2e%2e", {}, r"path '/model/info/..' cannot be used"),
    ("GET", "/ohif/%2e%2e/%2e%2e/datastore.py", {}, r"path .* cannot be used"),
    ("GET", "/static/%2e%2e/%2e%2e/app.py", {}, r"path .* cannot be used"),
    ("GET", "/proxy/dicom/wado/%2e%2e/%2e%2e/tools", {}, r"path .* cannot be used"),
    ("POST", "/activelearning/" + "x" * 400, {}, r"its part of 400 characters is longer"),
    ("GET", "/patchwise/queries/" + "9" * 30, {}, r"number '9+' cannot be used; numbers have at most 18 digits"),
]


@pytest.mark.parametrize(("method", "path", "query", "sentence"), TRAVERSAL)
def test_names_that_lead_elsewhere(client: Client, place: Path, method: str, path: str, query: dict, sentence: str):
    before = surroundings(place)
    reply = client.http.request(method, path, params=query)
    assert reply.status_code == 400, reply.text
    if sentence:
        assert re.search(sentence, sentence_of(reply)), reply.text
    assert surroundings(place) == before


UNKNOWN = [
    ("GET", "/datastore/image?image=nobody", r"no image 'nobody' in studies; GET /datastore/ lists"),
    ("GET", "/datastore/image?image=Bauch%20für%20Übung", r"no image 'Bauch für Übung'"),
    ("POST", "/infer/nothing?image=a", r"no model 'nothing'; known models are query_region, "),
    ("POST", "/infer/query_region?image=nobody", r"no image 'nobody'"),
    ("POST", "/infer/query_region?session_id=00000000", r"there is no session 00000000; PUT /session/ makes one"),
    ("POST", "/train/nothing", r"no model 'nothing' to train; known models are"),
    ("POST", "/scoring/nothing", r"no uncertainty 'nothing'; known ones are"),
    ("POST", "/activelearning/nothing", r"nothing"),
    ("POST", "/batch/infer/nothing", r"no model 'nothing'"),
    ("GET", "/model/nothing", r"Model File NOT Found for nothing"),
    ("GET", "/session/nothing", r"Session \(nothing\) Not Found"),
    ("GET", "/nothing", r"no route serves '/nothing'; GET /openapi.json lists the routes"),
    ("GET", "/proxy/dicom/qido/studies", r"this server works on a folder, so there is no DICOMweb server"),
    ("POST", "/infer/wsi/" + BUNDLE, r"this app segments volumes, not slides"),
    ("GET", "/patchwise/queries/999999", r"there is no query 999999"),
    ("GET", "/static/nothing.js", r"no route serves '/static/nothing.js'"),
]


@pytest.mark.parametrize(("method", "path", "sentence"), UNKNOWN)
def test_what_is_not_there(client: Client, method: str, path: str, sentence: str):
    reply = client.http.request(method, path)
    assert reply.status_code == 404, reply.text
    assert re.search(sentence, sentence_of(reply)), reply.text


REFUSED = [
    ("PUT", f"/model/{BUNDLE}", {"files": {"file": ("a.pt", b"weights")}}, 409, r"weights are not taken from requests"),
    ("DELETE", f"/model/{BUNDLE}", {}, 409, r"networks are not deleted by requests"),
    ("POST", "/reload", {}, 409, r"the app is not loaded again while it runs; restart the server"),
    ("GET", "/logs/?lines=-1", {}, 422, r"request query.lines: Input should be greater than or equal to 1, found '-1'"),
    ("GET", "/logs/?lines=99999999999", {}, 422, r"less than or equal to 100000"),
    ("GET", "/datastore/dataset?limit_cases=-5", {}, 422, r"greater than or equal to 0"),
    ("HEAD", f"/datastore/image?image={UID}&check_sum=ROT13:1", {}, 404, None),
    ("PATCH", "/datastore/image", {}, 405, r"'/datastore/image' is not served with PATCH"),
    ("POST", "/infer/query_region", {}, 400, r"there is no image to run on; name one"),
]


@pytest.mark.parametrize(("method", "path", "sent", "status", "sentence"), REFUSED)
def test_what_this_app_does_not_do(client: Client, method: str, path: str, sent: dict, status: int, sentence: str):
    reply = client.http.request(method, path, **sent)
    assert reply.status_code == status, reply.text
    if sentence:
        assert re.search(sentence, sentence_of(reply)), reply.text


# --- JSON -------------------------------------------------------------------------------------------------------------

BODIES = [
    (b'{"batch": NaN}', 400, r"the body holds the number nan; send finite numbers"),
    (b'{"lease_minutes": Infinity}', 400, r"the body holds the number inf"),
    (b'{"lease_minutes": 1e999}', 400, r"the body holds the number inf"),
    (b'{"seed": 1' + b"0" * 40 + b"}", 400, r"the body holds a whole number of 13\d bits; send numbers of at most 63"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", 400, r"the body is not usable JSON"),
    (b'{"client_id": "\\ud800"}', 400, r"the body holds half of a character"),
    (b"[" * 100_000, 400, r"the body is not usable JSON \(RecursionError\)"),
    (b"[" * 40 + b"]" * 40, 400, r"nested more than 32 levels deep"),
    (b'{"batch": 1', 400, r"the body must be a JSON object; it is not readable"),
    (b"\xff\xfe\x00", 400, r"the body is not usable JSON"),
    (b'"text"', 422, r"request body: Input should be a valid dictionary, found 'text'"),
    (b'{"client_id": "' + b"x" * (9 * MIB) + b'"}', 413, r"the body has more than the 8,388,608 bytes"),
    (b'{"batch": -3}', 400, r"batch: Input should be greater than or equal to 1, found -3"),
    (b'{"size": [-4, 8, 8]}', 400, r"size"),
    (b'{"size": [0, 0, 0]}', 400, r"size"),
    (b'{"stride": [0, 0, -1]}', 400, r"stride"),
    (b'{"size_mm": [-1, 5, 5]}', 400, r"size_mm.0: Input should be greater than 0, found -1"),
    (b'{"size_mm": [1e300, 5, 5]}', 400, r"size_mm.0: Input should be less than or equal to 1000000"),
    (b'{"axis": 7}', 400, r"axis: Input should be less than or equal to 2"),
    (b'{"regions": [{"image": "IMAGE", "start": [-1, 0, 0], "size": [4, 4, 4]}]}', 400, r"region"),
    (b'{"regions": [{"image": "IMAGE", "start": [0, 0, 9999], "size": [4, 4, 4]}]}', 400, r"region"),
    (b'{"regions": [{"image": "IMAGE", "start": [0, 0, 0], "size": [4, -4, 4]}]}', 400, r"region"),
    (b'{"regions": [{"image": "../../outside", "start": [0, 0, 0], "size": [4, 4, 4]}]}', 400, r"outside"),
    (b'{"regions": [{"image": null}]}', 400, r"region"),
    (b'{"bundle_path": "/tmp/mine"}', 400, r"bundle_path is not taken from requests: bundles run code"),
]


@pytest.mark.parametrize(("body", "status", "sentence"), BODIES)
def test_json_that_no_program_should_see(
    client: Client, place: Path, phantoms: Path, body: bytes, status: int, sentence: str
):
    before = surroundings(place)
    method = "precomputed" if b"regions" in body else "random"
    sent = body.replace(b"IMAGE", image(phantoms).encode())
    reply = client.http.post(f"/activelearning/{method}", content=sent, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    assert re.search(sentence, sentence_of(reply)), reply.text
    assert surroundings(place) == before


TASKS = [
    (f"/train/{BUNDLE}", {"gpus": [1]}, 400, r"gpus must be 'all' or numbers like '0,1', found \[1\]"),
    (f"/train/{BUNDLE}", {"recipe": "quick", "bundle_path": "/tmp"}, 400, r"bundle_path is not taken from requests"),
    (f"/train/{BUNDLE}", {"client_id": "x" * 200_000}, 413, r"the body has more than the 100,000 bytes"),
    (f"/train/{BUNDLE}", {"members": -1}, 400, r"members"),
    (f"/batch/infer/{BUNDLE}", {"images": ["/etc/passwd"]}, 404, r"no image '/etc/passwd'"),
    (f"/batch/infer/{BUNDLE}", {"images": "some"}, 400, r"images must be all, labeled, unlabeled or a list"),
    (f"/batch/infer/{BUNDLE}", {"label_tag": "../x"}, 400, r"label_tag '../x' cannot be used"),
    (f"/batch/infer/{BUNDLE}", {"label_tag": "final"}, 400, r"predictions are not saved as tag final"),
    (f"/batch/infer/{BUNDLE}", {"max_workers": -2}, 400, r"max_workers must be a whole number of at least 0"),
    (f"/batch/infer/{BUNDLE}", {"model": "other"}, 400, r"model is '.*' in the address and 'other' in params"),
    (
        "/scoring/",
        {"predictive_entropy": 3},
        400,
        r"what is asked of predictive_entropy must be a JSON object, found 3",
    ),
    ("/train/", {BUNDLE: [1]}, 400, r"must be a JSON object, found \[1\]"),
]


@pytest.mark.parametrize(("path", "body", "status", "sentence"), TASKS)
def test_tasks_start_no_process_for_what_cannot_be(client: Client, path: str, body: dict, status: int, sentence: str):
    reply = client.http.post(path, json=body)
    assert reply.status_code == status, reply.text
    assert re.search(sentence, sentence_of(reply)), reply.text
    assert client.http.get("/train/").status_code == 404
    assert client.http.get("/batch/infer").status_code == 404


PARAMS = [
    ({"image": "/etc/passwd"}, r"image is '.*' in the address and '/etc/passwd' in params; name it once"),
    ({"result_extension": "/../../outside.nii"}, r"result_extension '/../../outside.nii' is not known"),
    ({"label": "/etc/passwd"}, r"label is not taken from params"),
    ({"session": {"image": "/etc"}}, r"session is not taken from params"),
    ({"save_label": True, "label_tag": "final"}, r"predictions are not saved as tag final"),
    ("[1]", r"params must be a JSON object, found '\[1\]'"),
    ("{", r"params must be a JSON object; it is not readable"),
    ('{"a": NaN}', r"params holds the number nan"),
    ({"format": "exe"}, r"format must be segment or markups, found 'exe'"),
]


@pytest.mark.parametrize(("params", "sentence"), PARAMS)
def test_inference_reads_and_writes_nothing_else(
    client: Client, place: Path, phantoms: Path, params: Any, sentence: str
):
    before = surroundings(place)
    text = params if isinstance(params, str) else json.dumps(params)
    reply = client.http.post("/infer/query_region", params={"image": image(phantoms)}, data={"params": text})
    assert reply.status_code == 400, reply.text
    assert re.search(sentence, sentence_of(reply)), reply.text
    assert surroundings(place) == before


def test_wrong_content_types(client: Client):
    for kind, body, status in (("text/plain", b"{}", 422), ("multipart/form-data", b"x", 400)):
        reply = client.http.put("/datastore/label?image=a", content=body, headers={"Content-Type": kind})
        assert reply.status_code == status
        assert sentence_of(reply)
    reply = client.http.post("/activelearning/random", content=b"<a/>", headers={"Content-Type": "application/xml"})
    assert reply.status_code == 422
    assert re.search("request body", sentence_of(reply))
    broken = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = client.http.put("/datastore/label?image=a", content=b"--b\r\nnonsense", headers=broken)
    assert reply.status_code == 400
    assert re.search("no form that can be read|ends before its last boundary", sentence_of(reply))
    many = {"data": {f"f{i}": "x" for i in range(300)}, "files": {"label": ("a.nii.gz", b"")}}
    reply = client.http.put("/datastore/label?image=a", **many)
    assert reply.status_code == 413
    assert "more than 200 parts" in sentence_of(reply)
    large = {"data": {"params": json.dumps({"x": "y" * 2 * MIB})}, "files": {"label": ("a.nii.gz", b"")}}
    reply = client.http.put("/datastore/label?image=a", **large)
    assert reply.status_code == 413
    assert "more than 1,048,576 bytes beside its files" in sentence_of(reply)
