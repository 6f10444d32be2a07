# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Hostile and broken requests to a real server: a 4xx status, one sentence, nothing written, memory bounded."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest

from tests.system.conftest import BUNDLE, CLASSES, Client, Start, fill

MIB = 2**20
OUTSIDE = "../../outside"
UID = "0" * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own around the studies, with a temporary folder for the server beside them."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tmp").mkdir()
    (folder / "outside.nii.gz").write_bytes(b"somebody else's")
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, place: Path, phantoms: Path) -> Client:
    fill(place / "studies", phantoms)
    # What the server would write beside its studies has to be seen: its temporary files lie here too.
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(place / "tmp")
    try:
        started, made = start_server(place / "studies", members=2, batch=4, size="12,12,12")
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.__setitem__("TMPDIR", before)
    assert started.process is not None
    made.process = psutil.Process(started.process.pid)  # type: ignore[attr-defined]
    made.at_start = sorted(p.name for p in (place / "tmp").iterdir())  # type: ignore[attr-defined]
    return made


def surroundings(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file around and inside of the studies; the server's log and databases may grow.

    What an upload leaves in the temporary folder for a moment is looked at when all is over.
    """
    return {
        str(path.relative_to(place)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".log" and "sqlite" not in path.name and place / "tmp" not in path.parents
    }


def sentence_of(reply: httpx.Response) -> str:
    detail = reply.json()["detail"]
    assert isinstance(detail, str), detail
    assert "\n" not in detail
    assert "Traceback" not in detail
    return detail


def form(content: bytes, name: str = "label.nii.gz", params: Any = None, field: str = "label") -> dict[str, Any]:
    sent = {"client_id": "ann", "label_info": CLASSES} if params is None else params
    text = sent if isinstance(sent, str) else json.dumps(sent)
    return {"data": {"params": text}, "files": {field: (name, io.BytesIO(content))}}


def image(phantoms: Path) -> str:
    return sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0].name.removesuffix(".nii.gz")


def label(phantoms: Path) -> bytes:
    return sorted((phantoms / "labelsTr").glob("*.nii.gz"))[0].read_bytes()


def header(shape: tuple[int, ...], kind: type = np.uint8, **fields: Any) -> bytes:
    made = nib.Nifti1Header()
    made.set_data_dtype(kind)
    made["dim"][: len(shape) + 1] = [len(shape), *shape]
    made["pixdim"][1:4], made["magic"], made["vox_offset"] = 1, b"n+1", 352
    made["srow_x"], made["srow_y"], made["srow_z"] = np.eye(4)[:3]
    made["sform_code"] = 1
    for name, value in fields.items():
        made[name] = value
    return made.binaryblock + b"\0" * 4


def zeros(head: bytes, count: int) -> bytes:
    """A file of zeros that packs to a thousandth, made without holding it."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as packed:
        packed.write(head)
        for _ in range(count // MIB):
            packed.write(bytes(MIB))
    return stream.getvalue()


# --- names ------------------------------------------------------------------------------------------------------------

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
    ("GET", "/nothing", r"nothing is served at '/nothing'; GET /openapi.json lists what is"),
    ("GET", "/proxy/dicom/qido/studies", r"this server works on a folder, so there is no DICOMweb server"),
    ("POST", "/infer/wsi/" + BUNDLE, r"this app segments volumes, not slides"),
    ("GET", "/patchwise/queries/999999", r"there is no query 999999"),
    ("GET", "/static/nothing.js", r"nothing is served at '/static/nothing.js'"),
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
    (b'{"seed": 1' + b"0" * 5000 + b"}", 400, r"the body is no JSON that can be used"),
    (b'{"client_id": "\\ud800"}', 400, r"the body holds half of a character"),
    (b"[" * 100_000, 400, r"the body is no JSON that can be used \(RecursionError\)"),
    (b"[" * 40 + b"]" * 40, 400, r"nested more than 32 levels deep"),
    (b'{"batch": 1', 400, r"the body must be a JSON object; it is not readable"),
    (b"\xff\xfe\x00", 400, r"the body is no JSON that can be used"),
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


# --- files ------------------------------------------------------------------------------------------------------------


NRRD = b"NRRD0004\ntype: unsigned char\ndimension: 3\nsizes: 500 500 2000\nencoding: gzip\n"
BOMBS = [
    (
        "declared.nii.gz",
        lambda: gzip.compress(header((30000, 30000, 30000))),
        r"30000 x 30000 x 30000 voxels, at most 6",
    ),
    ("promised.nii.gz", lambda: gzip.compress(header((800, 800, 800)) + b"\0" * 999), r"declares 488.3 MiB of voxels"),
    ("unpacking.nii.gz", lambda: zeros(header((1024, 1024, 500)), 500 * MIB), r"unpack to 500 MiB are no scan"),
    ("flat.nii.gz", lambda: gzip.compress(header((32000, 16000))), r"its header says 32000 x 16000"),
    ("far.nii.gz", lambda: zeros(header((8, 8, 8), vox_offset=2**30), 64 * MIB), r"voxels at byte 1.07374e"),
    ("negative.nii.gz", lambda: gzip.compress(header((-5, 4, 4))), r"found shape \(-5, 4, 4\)"),
    ("axes.nii", lambda: header((4, 4, 4), dim=[77, 4, 4, 4, 4, 4, 4, 4]), r"77 axes|not readable as NIfTI"),
    ("nowhere.nii", lambda: header((4, 4, 4), srow_x=[np.nan] * 4) + bytes(64), r"no size or place; repair the affine"),
    ("complex.nii", lambda: header((4, 4, 4), np.complex64) + bytes(512), r"no grey values"),
    ("empty.nii.gz", lambda: b"", r"not readable as NIfTI"),
    ("noise.nrrd", lambda: b"NRRD0004\n" + b"x" * 5 * MIB, r"not readable as NRRD"),
    ("elsewhere.nrrd", lambda: NRRD.replace(b"gzip", b"raw\ndata file: /etc/passwd") + b"\n", r"says 'data file'"),
    ("growing.nrrd", lambda: NRRD + b"\n" + zeros(b"", 520 * MIB), r"holds more voxels than"),
    ("lacking.nrrd", lambda: NRRD + b"\n" + gzip.compress(bytes(99)), r"declares 476.8 MiB"),
]


@pytest.mark.parametrize(("name", "make", "sentence"), BOMBS, ids=[name for name, _, _ in BOMBS])
def test_bombs_cost_nothing(client: Client, place: Path, phantoms: Path, name: str, make: Any, sentence: str):
    """As an image, as an image of a session, as one to infer on, and as a label: refused each time, memory stays."""
    content = make()
    assert len(content) < 6 * MIB
    before, process = surroundings(place), client.process  # type: ignore[attr-defined]
    at_rest, seen = process.memory_info().rss, []
    for method, path, field in (
        ("PUT", "/datastore/image?image=bomb", "file"),
        ("PUT", "/session/", "files"),
        ("POST", f"/infer/{BUNDLE}", "file"),
        ("PUT", f"/datastore/label?image={image(phantoms)}&tag=original", "label"),
        ("PUT", f"/datastore/label?image={image(phantoms)}", "label"),
    ):
        with Watched(process) as watched:
            reply = client.http.request(method, path, **form(content, name, field=field))
        seen.append(watched.most)
        assert reply.status_code == 400, f"{path}: {reply.text}"
        told = sentence_of(reply)
        assert re.search(sentence, told) or (field == "label" and "has shape" in told), f"{path}: {told}"
    assert (max(seen) - at_rest) / MIB < 300
    assert surroundings(place) == before


class Watched:
    """The most memory a process has while something happens."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.most = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watched:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)


def test_file_names_and_archives_that_write_elsewhere(client: Client, place: Path):
    before = surroundings(place)
    scan = gzip.compress(header((4, 4, 4)) + bytes(64))
    for name in ("..", "a/..", "x" * 300 + ".nii.gz", "a\0.nii.gz", "/"):
        reply = client.http.put("/session/", content=raw_form("files", name, scan), headers=RAW)
        assert reply.status_code in (400, 422), name
        assert sentence_of(reply)
    archives = {"a.zip": io.BytesIO(), "b.tar": io.BytesIO(), "c.zip": io.BytesIO()}
    with zipfile.ZipFile(archives["a.zip"], "w") as packed:
        packed.writestr("../../outside.nii.gz", b"mine")
    with tarfile.open(fileobj=archives["b.tar"], mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../outside.nii.gz"))
    with zipfile.ZipFile(archives["c.zip"], "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.nii", bytes(MIB))
        packed.filelist[0].file_size = 2_202_009_600
    told = []
    for name, content in archives.items():
        reply = client.http.put("/session/?uncompress=true", files={"files": (name, content.getvalue())})
        assert reply.status_code in (400, 413)
        told.append(sentence_of(reply))
    assert "holds a file called '../../outside.nii.gz'; name files inside of it only" in told[0]
    assert "is no ZIP archive; send one .zip file" in told[1]
    assert "holds 1 files of 2,202,009,600 bytes, at most 10000 of 2,147,483,648 are unpacked" in told[2]
    assert surroundings(place) == before


RAW = {"Content-Type": "multipart/form-data; boundary=b"}


def raw_form(field: str, name: str, content: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n"


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(client: Client) -> list[dict[str, Any]]:
    """Two regions that were answered, and two that are open."""
    regions = client.ask("random", batch=4, seed=11).json()["regions"]
    for region in regions[:2]:
        assert client.submit(region["image"], queries=[region["query"]]).status_code == 200
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
    """Who answered may answer again, with the same label to the same effect; nobody else may, late or early."""
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
        f"query {held['query']} is skipped, so nobody can answer it; ask for the next region",
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
