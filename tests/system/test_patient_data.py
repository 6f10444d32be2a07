# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Data of the patient stay in the DICOM objects: files and responses of the real server about series of a PACS."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from eval.runner.server import ServerProcess
from tests.lib.dicom.archive import Archive
from tests.lib.dicom.objects import SHAPE, segmentation, series
from tests.system.conftest import BUNDLE, CLASSES

MARK = "Zebrowski"
# The one word that people are shown, so that they find the series; it stays out of logs all the same.
PATIENT = "P-471147"
# Values that a reader complains about too, because a complaint quotes them.
PERSON = {
    "PatientName": f"{MARK}^{'Name' * 20}",
    "PatientBirthDate": f"{MARK}-birth",
    "PatientSex": f"{MARK.lower()}",
    "PatientAddress": f"{MARK} street 1",
    "PatientComments": f"{MARK} comment",
    "ReferringPhysicianName": f"{MARK}^Referring",
    "InstitutionName": f"{MARK} hospital",
    "AccessionNumber": f"{MARK}0123456789012345",
    "StudyDescription": f"{MARK} knows the patient",
    "SeriesDescription": f"{MARK} {'long' * 20}",
    "OtherPatientIDs": f"{MARK}-other",
}


class Address(str):
    """A DICOMweb address in the place of a studies folder, which a server process makes where it is missing."""

    def mkdir(self, **_options: Any) -> None:
        pass


def named(items: list[Dataset]) -> list[Dataset]:
    """Objects with data of a patient that must not appear elsewhere."""
    for item in items:
        for keyword, value in PERSON.items():
            setattr(item, keyword, value)
    return items


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def archive() -> Iterator[Archive]:
    archive = Archive()
    yield archive
    archive.stop()


@pytest.fixture(scope="module")
def server(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("pacs")
    conf = {"models": BUNDLE, "labels": "anterior,posterior", "size": "2,2,2", "state": folder / "state"}
    env = {"MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}'}
    server = ServerProcess(folder, {**conf, "poll_seconds": 1}, log=folder / "server.log", threads=1, env=env)
    server.studies = Address(archive.url)
    server.start()
    yield server
    server.stop()


def test_a_patient_is_in_no_log_ledger_name_or_page(archive: Archive, server: ServerProcess, tmp_path: Path) -> None:
    plain = series(patient=PATIENT)
    slices = named(copy.deepcopy(plain))
    flat = named(series(patient=PATIENT))
    for item in flat:
        item.PixelSpacing = None
    archive.add(*slices, *flat)
    uid, told = str(plain[0].SeriesInstanceUID), []
    head = {"Connection": "close"}
    http = httpx.Client(base_url=server.url, timeout=120, headers=head, event_hooks={"response": [told.append]})
    until(lambda: uid in http.get("/datastore/?output=all").text)

    # An answer as a file, one as a segmentation, and a segmentation that cannot be read.
    sample = http.post("/activelearning/random", json={"client_id": "ann"}).json()
    assert sample["PatientID"].startswith(f"{PATIENT}: ")
    assert http.post("/infer/query_region", params={"image": uid}).status_code == 200
    image = nib.load(server.log.parent / "state" / f"{uid}.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), image.affine), tmp_path / "label.nii.gz")
    with open(tmp_path / "label.nii.gz", "rb") as label:
        params = {"params": json.dumps({"client_id": "ann", "label_info": CLASSES})}
        target = {"image": uid, "tag": "final"}
        assert http.put("/datastore/label", params=target, data=params, files={"label": label}).status_code == 200
    assert http.post("/activelearning/random", json={"client_id": "ann"}).json()["id"] == uid
    whole = segmentation(plain, np.ones(SHAPE, np.uint8), ["anterior"])
    unreadable = segmentation(plain, np.ones(SHAPE, np.uint8), ["anterior"])
    del unreadable.PerFrameFunctionalGroupsSequence
    archive.add(*named([unreadable, whole]))
    until(lambda: len(pacs(http)["segmentations"]) == 2)
    assert {found["outcome"] for found in pacs(http)["segmentations"]} == {"imported", "left"}
    until(lambda: sum(item.Modality == "SEG" for item in archive.objects.values()) > 2)
    assert pacs(http)["troubles"] == {}

    for page in ("", "progress", "answers", "agreement", "queries/1", "queries/1/picture.png"):
        http.get(f"/patchwise/{page}")
    for answer in told:
        assert not holds(answer.read(), MARK), answer.url
        if "/patchwise/" in answer.url.path or "/info/" in answer.url.path:
            assert not holds(answer.content, PATIENT), answer.url
    for word in (MARK, PATIENT):
        assert not holds(server.log.read_bytes(), word)
    for file in server.log.parent.rglob("*"):
        assert MARK not in str(file)
        assert PATIENT not in str(file)
        # A segmentation is kept unchanged, since its author signed the object itself.
        if file.is_file() and file.suffix != ".dcm":
            assert not holds(file.read_bytes(), MARK), file


def pacs(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/info/").json()["patchwise"]["pacs"]
    return found


def holds(content: bytes, word: str) -> bool:
    return re.search(word.encode(), content, re.IGNORECASE) is not None
