# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A bad image is left out and named, and comes back when its file changes."""

from __future__ import annotations

import os
import time

import nibabel as nib
import numpy as np
import pytest

from lib.ledger.queries import QueryLedger
from lib.studies import image_checks
from lib.studies.datastore import PartialLabelDatastore
from lib.studies.file_cache import Stamped
from lib.studies.unused_files import unused_files

CLASSES = {"a": 1}


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.ones((5, 4, 3), np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    return PartialLabelDatastore(folder, CLASSES, QueryLedger(tmp_path / "ledger.sqlite"))


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_file_that_is_still_being_copied_is_taken_in_when_it_is_complete(store):
    path = store.studies / "b.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    assert list(store.unusable(["a", "b"])) == ["b"]
    assert list(store.pool()[0]) == ["a"]
    assert "still being copied" in store.left_out()["b.nii.gz"]
    path.write_bytes(content)
    assert list(store.pool()[0]) == ["a", "b"]
    assert store.left_out() == {}


def test_a_copy_whose_size_and_time_were_there_first_is_looked_at_again(store, monkeypatch):
    """Some file systems set size and time at the beginning of a copy."""
    path = store.studies / "b.nii.gz"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:-30] + bytes(30))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert list(store.unusable(["b"])) == ["b"]
    path.write_bytes(content)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert list(store.pool()[0]) == ["a"]
    now = time.time() + 2 * image_checks.AGAIN_SECONDS
    monkeypatch.setattr(image_checks.time, "time", lambda: now)
    assert list(store.pool()[0]) == ["a", "b"]
    assert store.left_out() == {}


def test_a_settled_file_is_read_once(store, monkeypatch):
    path = store.studies / "b.nii.gz"
    path.write_bytes(b"no image")
    age(path, 1000)
    sentence = store.left_out()["b.nii.gz"]
    assert sentence.startswith("b.nii.gz: not readable as NIfTI")
    assert "copied" not in sentence
    monkeypatch.setattr(image_checks, "image_geometry", None)
    assert store.left_out() == {"b.nii.gz": sentence}


def test_a_process_sees_the_finds_of_another_one(store):
    file = store.image_files()["b"]
    other = PartialLabelDatastore(store.studies, CLASSES, QueryLedger(store.ledger.path))
    other.leave_out("b", file, "b.nii.gz: 3 voxels are NaN")
    assert list(store.pool()[0]) == ["a"]
    assert store.left_out() == {"b.nii.gz": "b.nii.gz: 3 voxels are NaN"}
    other.leave_out("a", Stamped(file.path, 1, 2), "of a file that is gone")
    assert list(store.pool()[0]) == ["a"]


def test_each_sentence_is_logged_once(store, caplog):
    (store.studies / "b.nii.gz").write_bytes(b"no image")
    age(store.studies / "b.nii.gz", 1000)
    (store.studies / "c.NII.GZ").write_bytes(b"")
    for _ in range(3):
        store.left_out()
    assert len([r for r in caplog.records if "b.nii.gz" in r.getMessage()]) == 1
    assert len([r for r in caplog.records if "rename it to c.nii.gz" in r.getMessage()]) == 1


def test_every_file_that_is_not_used_is_named(tmp_path):
    for name in (
        *("a.nii.gz", "a.nrrd", "b.mha", "C.NII.GZ", "d.Nii", "e.seg.nrrd", "f.SEG.NRRD", "g.img", "g.hdr", "h.mhd"),
        *("h.raw", "i.nhdr", "j.dcm", "notes.txt", ".hidden", "._a.nii.gz", "dataset.json", "k.nii.gz.part"),
        *("labels/final/a.nii.gz", "labels/final/a.seg.nrrd", "labels/final/b.seg.nrrd", "labels/final/x.docx"),
        *("series/1.dcm", ".patchwise/ledger.sqlite"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = unused_files(tmp_path)
    assert sorted(found) == sorted(
        [
            *("a.nrrd", "C.NII.GZ", "d.Nii", "e.seg.nrrd", "f.SEG.NRRD", "g.img", "g.hdr", "h.mhd", "h.raw", "i.nhdr"),
            *("j.dcm", "notes.txt", "k.nii.gz.part", "labels/final/a.seg.nrrd", "labels/final/x.docx", "series"),
        ]
    )
    assert found["a.nrrd"] == "a.nrrd: a second file of a, of which a.nii.gz is used; remove or rename one"
    assert "rename it to C.nii.gz" in found["C.NII.GZ"]
    assert "rename it to d.nii" in found["d.Nii"]
    assert "segmentation of 3D Slicer" in found["e.seg.nrrd"]
    assert "segmentation of 3D Slicer" in found["f.SEG.NRRD"]
    assert "half of a pair" in found["g.img"]
    assert "voxels are in another file" in found["h.mhd"]
    assert "a folder, which is not searched" in found["series"]
    assert all(sentence.startswith(f"{name}: ") for name, sentence in found.items())
