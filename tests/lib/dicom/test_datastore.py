# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentations of an archive as answers, and labels stored in it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pydicom
import pytest

from lib.dicom.web_client import PacsError
from tests.lib.dicom.objects import AFFINE, CLASSES, SHAPE, segmentation, series
from tests.lib.dicom.store import BOX, archive, expected, fetched, label, lease, make_store, merged, store

__all__ = ["archive", "make_store", "store"]  # fixtures


# --- segmentations that come in --------------------------------------------------------------------------------------


def test_segmentation_is_cut_to_the_open_region_and_taken_once(archive, store, make_store):
    slices, uid = fetched(archive, store)
    query = lease(store, uid)
    item = segmentation(slices, np.array([0, 2, 1], np.uint8)[label()], ["posterior", "ANTERIOR"])
    archive.add(item)
    store.importer.update()
    np.testing.assert_array_equal(merged(store, uid), expected())
    [answer] = store.ledger.answers.of_image(uid)
    assert answer.client == "ann"
    assert answer.info["sop_instance_uid"] == item.SOPInstanceUID
    assert store.ledger.query(query).status == "answered"
    kept = pydicom.dcmread(store.importer.kept / f"{item.SOPInstanceUID}.dcm")
    assert kept.PixelData == item.PixelData
    store.importer.update()
    again = make_store()
    again.mirror.update()
    again.importer.update()
    assert len(store.ledger.answers.of_image(uid)) == 1
    assert archive.retrieved.count(str(item.SOPInstanceUID)) == 1


def test_kill_between_answer_and_note_does_not_double_the_answer(archive, store, make_store, monkeypatch):
    slices, uid = fetched(archive, store)
    lease(store, uid)
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"]))
    monkeypatch.setattr(store.importer, "note", lambda *args: None)
    store.importer.update()
    again = make_store()
    again.mirror.update()
    again.importer.update()
    assert len(store.ledger.answers.of_image(uid)) == 1
    assert again.importer.outcomes()[0]["outcome"] == "imported"


def test_second_segmentation_by_the_same_person_replaces_the_first(archive, store):
    slices, uid = fetched(archive, store)
    lease(store, uid)
    archive.add(segmentation(slices, np.zeros(SHAPE, np.uint8), ["Anterior"]))
    store.importer.update()
    assert not merged(store, uid)[BOX].any()
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    np.testing.assert_array_equal(merged(store, uid), expected())


def test_author_tells_apart_who_holds_regions_of_one_series(archive, store):
    slices, uid = fetched(archive, store)
    lease(store, uid, "ann")
    bob = lease(store, uid, "bob", (3, 2, 1))
    archive.add(unclear := segmentation(slices, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    assert "ann, bob hold regions" in store.importer.outcomes()[0]["detail"]
    assert merged(store, uid) is None
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"], ContentCreatorName="BOB"))
    store.importer.update()
    assert store.ledger.query(bob).status == "answered"
    assert merged(store, uid)[4, 3, 2] == 2
    assert (merged(store, uid)[BOX] == 255).all()
    assert unclear.SOPInstanceUID in {o["segmentation"] for o in store.importer.outcomes()}


def strange(slices):
    wrong = np.zeros(SHAPE, np.uint8)
    wrong[0, 0, 0] = 1
    return segmentation(slices, wrong, ["Tumour"])


def broken(slices):
    item = segmentation(slices, label(), ["Anterior", "Posterior"])
    item.PixelData = item.PixelData[:-2]
    return item


def painted(slices):
    """The frame's segment inside of the region, where no frame is."""
    wrong = np.zeros(SHAPE, np.uint8)
    wrong[0, 0, 0] = 1
    return segmentation(slices, wrong, ["query_region"])


@pytest.mark.parametrize(
    ("make", "sentence"), [(strange, "'Tumour'"), (broken, "is damaged"), (painted, "query_region")]
)
def test_what_cannot_be_used_is_left_with_a_sentence(archive, store, make, sentence):
    slices, uid = fetched(archive, store)
    query = lease(store, uid)
    archive.add(make(slices))
    store.importer.update()
    [outcome] = store.pacs_status()["segmentations"]
    assert outcome["outcome"] == "left"
    assert sentence in outcome["detail"]
    assert store.ledger.query(query).status == "open"
    assert merged(store, uid) is None
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    np.testing.assert_array_equal(merged(store, uid), expected())


@pytest.mark.parametrize(("falling", "outcome"), [(False, "left"), (True, "imported")])
def test_ohif_is_believed_only_where_it_keeps_the_order_of_slices(archive, store, falling, outcome):
    slices = series()
    for k, item in enumerate(slices):
        item.InstanceNumber = 9 - k if falling else k
    archive.add(*slices)
    store.mirror.update()
    store.mirror.update()
    lease(store, str(slices[0].SeriesInstanceUID))
    unnamed = {"Manufacturer": "Unspecified", "ManufacturerModelName": "Unspecified"}
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"], **unnamed))
    store.importer.update()
    assert store.importer.outcomes()[0]["outcome"] == outcome
    assert ("OHIF" in store.importer.outcomes()[0]["detail"]) is not falling


def test_segmentation_nobody_asked_for_is_left_for_good(archive, store):
    slices, uid = fetched(archive, store)
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    assert "no region of this series is open" in store.importer.outcomes()[0]["detail"]
    lease(store, uid)
    store.importer.update()
    assert merged(store, uid) is None


def test_segmentations_of_other_studies_are_not_even_fetched(archive, store):
    fetched(archive, store)
    other = series()
    archive.add(item := segmentation(other, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    assert str(item.SOPInstanceUID) not in archive.retrieved


def test_segmentation_of_a_series_that_is_on_its_way_waits(archive, store):
    slices = series()
    archive.add(*slices)
    store.mirror.update()
    archive.add(segmentation(slices, label(), ["Anterior", "Posterior"]))
    store.importer.update()
    assert store.importer.outcomes() == []
    store.mirror.update()
    lease(store, str(slices[0].SeriesInstanceUID))
    store.importer.update()
    assert store.importer.outcomes()[0]["outcome"] == "imported"


# --- labels that go out ----------------------------------------------------------------------------------------------


def saved(store, uid, tmp_path):
    path = tmp_path / "sent" / f"{uid}.nii.gz"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(label(), AFFINE), path)
    info = [{"name": name, "idx": value} for name, value in CLASSES.items()]
    store.save_label(uid, str(path), "final", {"client_id": "ann", "label_info": info})


def test_saved_label_is_stored_without_unlabelled_voxels_and_recognised(archive, store, tmp_path, make_store):
    _, uid = fetched(archive, store)
    lease(store, uid)
    saved(store, uid, tmp_path)
    store._exchange()
    [item] = [i for i in archive.objects.values() if i.Modality == "SEG"]
    assert [s.SegmentLabel for s in item.SegmentSequence] == ["Anterior", "Posterior"]
    assert np.count_nonzero(item.pixel_array) == 2
    for each in (store, make_store()):
        each.mirror.update()
        each.importer.update()
        assert each.importer.outcomes() == []
    assert len(store.ledger.answers.of_image(uid)) == 1


def test_label_that_could_not_be_stored_is_stored_later_also_by_the_next_server(archive, store, tmp_path, make_store):
    _, uid = fetched(archive, store)
    lease(store, uid)
    saved(store, uid, tmp_path)
    archive.status = 503
    with pytest.raises(PacsError):
        store._store(uid)
    archive.status = 200
    again = make_store()
    again.connect()
    again._exchange()
    assert [i.Modality for i in archive.objects.values()].count("SEG") == 1
    third = make_store()
    third.connect()
    third._exchange()
    assert [i.Modality for i in archive.objects.values()].count("SEG") == 1
