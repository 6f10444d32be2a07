# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The datastore as a pool: its lists, and their cost for many images."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from lib.ledger.queries import QueryLedger
from lib.studies.datastore import PartialLabelDatastore
from lib.studies.submissions import SubmissionStore
from tests.lib.studies.test_datastore import AFFINE, CLASSES, INFO, SHAPE, store, studies, submit, truth, write

__all__ = ["store", "studies"]  # fixtures


def test_files_that_appear_and_vanish_are_noticed(store):
    shutil.copy(store.studies / "a.nii.gz", store.studies / "c.nii.gz")
    assert store.list_images() == ["a", "b", "c"]
    (store.studies / "b.nii.gz").unlink()
    assert store.list_images() == ["a", "c"]


def test_the_listing_names_images_and_labels(store, tmp_path):
    submit(store, tmp_path, truth())
    listing = json.loads(json.dumps(store.json()))
    assert listing["objects"]["a"]["labels"]["final"]["ext"] == ".nii.gz"
    assert listing["objects"]["b"]["labels"] == {}
    assert isinstance(store.annotations, SubmissionStore)
    assert Path(store.get_dataset_archive(None)).stat().st_size > 0


class Looks:
    """Counter of operations whose cost grows with the number of files: entries of read folders, and checked files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, listdir, scandir, stat = 0, os.listdir, os.scandir, os.stat

        def listed(*where):
            found = listdir(*where)
            self.count += len(found)
            return found

        def scanned(*where):
            with scandir(*where) as entries:
                self.count += len(found := list(entries))
            return nullcontext(iter(found))

        def looked(*where, **keys):
            self.count += 1
            return stat(*where, **keys)

        for name, counting in (("listdir", listed), ("scandir", scanned), ("stat", looked)):
            monkeypatch.setattr(os, name, counting)

    def of(self, work, repeats=3):
        """Counts of the last of several times, when all that is remembered is known."""
        for i in range(repeats):
            self.count = 0
            work(i)
        return self.count


def test_an_update_looks_at_no_more_files_in_a_large_pool(store, tmp_path, monkeypatch):
    upload = write(tmp_path / "upload" / "label.nii.gz", truth(), dtype=np.uint8)
    sent = {"label_info": INFO, "client_id": "ann", "whole": True}
    work = [
        lambda i: store.update_image_info("a", {"seen": i}),
        lambda i: store.update_label_info("a", "final", {"seen": i}),
        lambda i: store.save_label("a", str(upload), "final", sent),
    ]
    submit(store, tmp_path, truth())
    time.sleep(0.05)  # a folder that changed within the clock's grain is read again
    looks = Looks(monkeypatch)
    small = [looks.of(w) for w in work]
    for i in range(300):
        os.link(store.studies / "b.nii.gz", store.studies / f"more_{i:05d}.nii.gz")
        os.link(store.studies / "b.nii.gz", store.studies / "labels" / "final" / f"more_{i:05d}.nii.gz")
    time.sleep(0.05)
    assert looks.of(lambda _: store.list_images(), 1) > 300
    assert len(store.list_images()) == 302
    assert [looks.of(w) for w in work] == small
    assert min(small) > 0


def test_grids_and_digests_of_a_pool_are_read_once(store, monkeypatch):
    files = store.image_files()
    assert list(files) == ["a", "b"]
    grid = store.geometries(files)["a"]
    assert (grid.shape, grid.spacing) == (SHAPE, (1.0, 1.5, 2.0))
    digests = store.digests(files)
    assert digests["a"] == store.image_digest("a")
    monkeypatch.setattr("lib.studies.image_checks.image_geometry", None)
    again = PartialLabelDatastore(store.studies, CLASSES, QueryLedger(store.ledger.path))
    assert np.allclose(again.geometry("a")[1], AFFINE)
    assert again.digests(again.image_files()) == digests


def test_an_unreadable_image_is_named_before_anybody_is_asked_about_it(store):
    assert store.unusable(["a", "b"]) == {}
    path = store.studies / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    wrong = store.unusable(["a", "b"])
    assert list(wrong) == ["b"]
    assert wrong["b"].startswith("b.nii.gz: not readable as NIfTI (Compressed file ended")
    assert store.left_out() == {"b.nii.gz": wrong["b"]}
    assert list(store.pool()[0]) == ["a"]
