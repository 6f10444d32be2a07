# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A whole round on a PACS: series come in, regions go out, segmentations come back, labels are stored there."""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest
from dicomweb_client import DICOMwebClient

from eval.errors import RefereeError
from eval.runner.server import free_port
from tests.dicom.conftest import SOON, until
from tests.lib.dicom.objects import segmentation


class Site:
    """An archive with three phantoms, and the app on it."""

    def __init__(self, orthanc, scans, serve, folder):
        self.orthanc, self.scans, self.state = orthanc, {scan.uid: scan for scan in scans}, folder / "state"
        for scan in scans[:3]:
            orthanc.send(scan.files)
        self.serve = serve
        self.server = serve(orthanc.url, self.state)
        self.http = httpx.Client(base_url=self.server.url, timeout=120)
        until(lambda: self.pacs()["fetched"] == 3, 60, "three series are fetched")

    def pacs(self):
        return self.http.get("/info/").json()["patchwise"]["pacs"]

    def ask(self, **request):
        reply = self.http.post("/activelearning/random", json=request)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def outcome(self, item):
        uid = str(item.SOPInstanceUID)
        return next((o for o in self.pacs()["segmentations"] if o["segmentation"] == uid), None)

    def label(self, image):
        path = self.state / "labels" / "final" / f"{image}.nii.gz"
        return np.asarray(nib.load(path).dataobj) if path.is_file() else None


@pytest.fixture(scope="module")
def site(make_orthanc, scans, serve, tmp_path_factory):
    return Site(make_orthanc(), scans, serve, tmp_path_factory.mktemp("site"))


def box(entry):
    return tuple(slice(s, s + d) for s, d in zip(entry["start"], entry["size"], strict=True))


def test_copies_have_values_and_axes_of_the_series(site):
    for uid, scan in list(site.scans.items())[:3]:
        image = nib.load(site.state / f"{uid}.nii.gz")
        assert image.shape == scan.label_xyz.shape
        first = scan.slices[0]
        x, y, z = (float(v) for v in first.ImagePositionPatient)
        np.testing.assert_allclose((image.affine @ [0, 0, 0, 1])[:3], [-x, -y, z], atol=1e-4)
        values = first.pixel_array * float(first.get("RescaleSlope", 1)) + float(first.get("RescaleIntercept", 0))
        np.testing.assert_allclose(np.asarray(image.dataobj)[:, :, 0], values.T, atol=1e-3)


def test_new_series_appears_soon(site):
    site.orthanc.send(list(site.scans.values())[3].files)
    seconds = until(lambda: site.pacs()["fetched"] == 4, SOON, "a new series is in the pool")
    assert seconds < SOON


def test_sample_has_what_ohif_shows_and_the_cue(site):
    answer = site.ask(client_id="shown")
    scan = site.scans[answer["id"]]
    assert answer["SeriesInstanceUID"] == scan.uid
    assert answer["StudyInstanceUID"] == scan.study
    assert (answer["Modality"], answer["StudyDate"], answer["StudyTime"]) == ("MR", "20000101", "120000")
    assert answer["RetrieveURL"].startswith("http")
    assert answer["PatientID"].startswith(f"{scan.case}: ")
    site.http.post("/activelearning/release", json={"query": answer["regions"][0]["query"], "client_id": "shown"})


def test_frame_comes_as_nrrd_on_the_grid_of_the_series(site):
    answer = site.ask(client_id="framed")
    entry = answer["regions"][0]
    params = {"client_id": "framed", "result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    reply = site.http.post(
        "/infer/query_region",
        params={"image": answer["id"], "output": "image"},
        data={"params": json.dumps(params)},
    )
    assert reply.status_code == 200, reply.text
    header, _, payload = reply.content.partition(b"\n\n")
    shape = site.scans[answer["id"]].label_xyz.shape
    assert b"type: uchar" in header or b"type: unsigned char" in header
    assert f"sizes: {shape[0]} {shape[1]} {shape[2]}".encode() in header
    frame = np.frombuffer(payload, np.uint8).reshape(shape, order="F")
    assert set(np.unique(frame)) == {0, 1}
    inner = tuple(slice(s.start + 1, s.stop - 1) for s in box(entry))
    assert not frame[inner].any()
    site.http.post("/activelearning/release", json={"query": entry["query"], "client_id": "framed"})


def test_segmentation_stored_through_the_proxy_is_cut_and_merged_soon(site):
    answer = site.ask()
    entry, scan = answer["regions"][0], site.scans[answer["id"]]
    item = segmentation(scan.slices, np.array([0, 2, 1], np.uint8)[scan.label_xyz], ["Posterior", "ANTERIOR"])
    DICOMwebClient(f"{site.server.url}/proxy/dicom/stow").store_instances([item])
    seconds = until(lambda: site.outcome(item), SOON, "the segmentation is taken in")
    assert seconds < SOON
    outcome = site.outcome(item)
    assert outcome["outcome"] == "imported", outcome
    expected = np.full(scan.label_xyz.shape, 255, np.uint8)
    expected[box(entry)] = scan.label_xyz[box(entry)]
    np.testing.assert_array_equal(site.label(scan.uid), expected)
    assert (site.state / ".patchwise" / "segmentations" / f"{item.SOPInstanceUID}.dcm").is_file()
    query = site.http.get(f"/patchwise/queries/{entry['query']}").json()
    assert query["submitted"]


def test_segmentation_is_taken_in_once_also_after_a_restart(site):
    before = site.http.get("/patchwise/answers").json()
    site.server.stop()
    site.server.start()
    until(lambda: site.pacs()["series"] == 4, 30, "the series are listed again")
    answer = site.ask(client_id="later")
    time.sleep(8)
    assert site.http.get("/patchwise/answers").json() == before
    entry = answer["regions"][0]
    site.http.post("/activelearning/release", json={"query": entry["query"], "client_id": "later"})


def test_unknown_segment_is_left_with_a_sentence(site):
    answer = site.ask()
    scan, entry = site.scans[answer["id"]], answer["regions"][0]
    before = site.label(scan.uid)
    wrong = np.zeros(scan.label_xyz.shape, np.uint8)
    wrong[box(entry)] = 1
    item = segmentation(scan.slices, wrong, ["Tumour"])
    DICOMwebClient(site.orthanc.url).store_instances([item])
    until(lambda: site.outcome(item), SOON, "the segmentation is looked at")
    outcome = site.outcome(item)
    assert outcome["outcome"] == "left"
    assert "'Tumour'" in outcome["detail"]
    after = site.label(scan.uid)
    assert (before is None and after is None) or np.array_equal(before, after)
    right = segmentation(scan.slices, scan.label_xyz, ["anterior", "posterior"])
    DICOMwebClient(site.orthanc.url).store_instances([right])
    until(lambda: site.outcome(right), SOON, "the repaired segmentation is taken in")
    assert site.outcome(right)["outcome"] == "imported"


def test_label_saved_over_http_is_stored_without_255_and_not_taken_for_an_answer(site):
    answer = site.ask(client_id="ann")
    scan, entry = site.scans[answer["id"]], answer["regions"][0]
    known = len(site.orthanc.segmentations(scan.study))
    count = len(site.http.get("/patchwise/answers", params={"image": scan.uid}).json())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "label.nii.gz"
        nib.save(nib.Nifti1Image(scan.label_xyz, nib.load(site.state / f"{scan.uid}.nii.gz").affine), path)
        info = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
        reply = site.http.put(
            "/datastore/label",
            params={"image": scan.uid, "tag": "final"},
            data={"params": json.dumps({"client_id": "ann", "label_info": info})},
            files={"label": ("label.nii.gz", io.BytesIO(path.read_bytes()))},
        )
    assert reply.status_code == 200, reply.text
    until(lambda: len(site.orthanc.segmentations(scan.study)) > known, SOON, "the label is in the archive")
    stored = max(site.orthanc.segmentations(scan.study), key=lambda s: int(s.SeriesNumber))
    assert [s.SegmentLabel for s in stored.SegmentSequence] == ["anterior", "posterior"]
    label = site.label(scan.uid)
    assert int(np.unpackbits(np.frombuffer(stored.PixelData, np.uint8)).sum()) == int(np.isin(label, [1, 2]).sum())
    assert (label[box(entry)] == scan.label_xyz[box(entry)]).all()
    time.sleep(8)
    assert len(site.http.get("/patchwise/answers", params={"image": scan.uid}).json()) == count + 1


def test_series_that_is_gone_leaves_the_pool(site):
    images = set(site.http.get("/datastore/", params={"output": "all"}).json()["objects"])
    gone = next(uid for uid in images if site.label(uid) is None)
    site.orthanc.delete(gone)
    until(lambda: site.pacs()["fetched"] == len(images) - 1, 30, "its copy is removed")
    site.orthanc.send(site.scans[gone].files)
    until(lambda: site.pacs()["fetched"] == len(images), SOON, "it is back")


def test_archive_that_stops_is_named_and_work_goes_on(site):
    site.orthanc.stop()
    until(lambda: site.pacs()["troubles"], 30, "the trouble is told")
    assert "cannot be reached" in next(iter(site.pacs()["troubles"].values()))
    answer = site.ask(client_id="offline")
    assert answer["regions"]
    site.http.post("/activelearning/release", json={"query": answer["regions"][0]["query"], "client_id": "offline"})
    site.orthanc.start()
    until(lambda: not site.pacs()["troubles"], 30, "it goes on")


def test_server_without_archive_and_copies_ends_with_a_sentence(serve, tmp_path):
    with pytest.raises(RefereeError, match="cannot be reached: start it, or check the address"):
        serve(f"http://127.0.0.1:{free_port()}/dicom-web", tmp_path / "state")


def test_real_scans(make_orthanc, real_scans, serve, tmp_path):
    orthanc = make_orthanc()
    for scan in real_scans:
        orthanc.send(scan.files)
    server = serve(orthanc.url, tmp_path / "state")
    http = httpx.Client(base_url=server.url, timeout=120)
    pacs = lambda: http.get("/info/").json()["patchwise"]["pacs"]  # noqa: E731
    until(lambda: pacs()["fetched"] == len(real_scans), 60, "the scans are fetched")
    answer = http.post("/activelearning/random", json={}).json()
    scan = next(s for s in real_scans if s.uid == answer["id"])
    item = segmentation(scan.slices, scan.label_xyz, ["anterior", "posterior"])
    orthanc_client = DICOMwebClient(orthanc.url)
    orthanc_client.store_instances([item])
    until(lambda: pacs()["segmentations"], SOON, "the segmentation is taken in")
    assert pacs()["segmentations"][0]["outcome"] == "imported"
    label = np.asarray(nib.load(tmp_path / "state" / "labels" / "final" / f"{scan.uid}.nii.gz").dataobj)
    region = box(answer["regions"][0])
    np.testing.assert_array_equal(label[region], scan.label_xyz[region])
    assert (label == 255).sum() == label.size - label[region].size
    server.stop()
