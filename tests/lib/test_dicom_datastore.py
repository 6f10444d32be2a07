# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import nibabel as nib
import numpy as np
import pydicom
import pytest
from fastapi import HTTPException
from monailabel.config import settings

from lib.dicom_datastore import DicomDatastore, state_folder
from lib.dicom_web import Pacs
from lib.errors import PacsError
from lib.ledger import QueryLedger
from lib.ledger_records import Asked
from lib.regions import Region
from tests.lib.dicom_archive import Archive
from tests.lib.dicom_objects import AFFINE, CLASSES, SHAPE, segmentation, series, values

BOX = (slice(0, 2), slice(0, 2), slice(0, 2))


@pytest.fixture
def archive():
    archive = Archive()
    yield archive
    archive.stop()


@pytest.fixture
def make_store(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_SEARCH_FILTER", {"Modality": "MR"})

    def make() -> DicomDatastore:
        ledger = QueryLedger(tmp_path / ".patchwise" / "ledger.sqlite")
        return DicomDatastore(tmp_path, CLASSES, ledger, Pacs(archive.url))

    return make


@pytest.fixture
def store(make_store):
    return make_store()


def fetched(archive, store, **facts):
    """A series in the archive and in the pool."""
    slices = series(**facts)
    archive.add(*slices)
    store.mirror.update()
    store.mirror.update()
    return slices, str(slices[0].SeriesInstanceUID)


def lease(store, image, client="ann", start=(0, 0, 0)):
    asked = [Asked(Region(image, start, (2, 2, 2)), "patch", None, {})]
    [query] = store.ledger.ask(f"{client}{start}", "random", 0, asked)
    store.ledger.lease([query.id], client, 60)
    return query.id


def label():
    label_xyz = np.zeros(SHAPE, np.uint8)
    label_xyz[0, 0, 0], label_xyz[1, 1, 1], label_xyz[4, 3, 2] = 1, 2, 2
    return label_xyz


def merged(store, image):
    path = store.label_path(image, "final")
    return np.asarray(nib.load(path).dataobj) if path else None


def expected():
    partial = np.full(SHAPE, 255, np.uint8)
    partial[BOX] = label()[BOX]
    return partial


# --- the pool --------------------------------------------------------------------------------------------------------


def test_series_comes_in_as_nifti_with_its_facts(archive, store):
    _, uid = fetched(archive, store, patient="case_7")
    image = nib.load(store.image_path(uid))
    np.testing.assert_array_equal(np.asarray(image.dataobj), 2 * values().astype(int) - 7)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    info = store.get_image_info(uid)
    assert (info["Modality"], info["StudyDate"], info["SeriesInstanceUID"]) == ("MR", "20000101", uid)
    assert info["RetrieveURL"].startswith(archive.url)
    assert "PatientID" not in info
    assert store.with_patient(uid, f"{uid}: axial 3") == "case_7: axial 3"


def test_series_that_is_still_being_sent_is_waited_for(archive, store):
    slices = series()
    archive.add(*slices[:2])
    store.mirror.update()
    archive.add(slices[2])
    store.mirror.update()
    assert store.list_images() == []
    store.mirror.update()
    assert nib.load(store.image_path(store.list_images()[0])).shape == SHAPE


def test_series_that_grew_is_fetched_again_until_somebody_was_asked(archive, store):
    slices = series()
    archive.add(*slices[:2])
    store.mirror.update()
    store.mirror.update()
    uid = store.list_images()[0]
    archive.add(slices[2])
    store.mirror.update()
    store.mirror.update()
    assert nib.load(store.image_path(uid)).shape == SHAPE
    lease(store, uid)
    del archive.objects[str(slices[2].SOPInstanceUID)]
    store.mirror.update()
    store.mirror.update()
    assert nib.load(store.image_path(uid)).shape == SHAPE
    assert "had 3 instances" in store.pacs_status()["refused"][uid]


def test_what_is_no_volume_is_named_and_fetched_once(archive, store):
    slices = series()
    archive.add(slices[0])
    for _ in range(4):
        store.mirror.update()
    uid = str(slices[0].SeriesInstanceUID)
    assert "one slice" in store.pacs_status()["refused"][uid]
    assert archive.retrieved == [uid]


def test_listed_series_is_fetched_when_it_is_asked_for(archive, store):
    slices = series()
    archive.add(*slices)
    store.mirror.update()
    assert store.list_images() == []
    assert store.image_path(str(slices[0].SeriesInstanceUID)).is_file()


def test_copy_goes_with_its_series_but_not_with_all_of_them(archive, store):
    first, gone = fetched(archive, store)
    _, kept = fetched(archive, store)
    for item in first:
        del archive.objects[str(item.SOPInstanceUID)]
    store.mirror.update()
    store.mirror.update()
    assert set(store.list_images()) == {gone, kept}
    store.mirror.update()
    assert store.list_images() == [kept]
    archive.objects.clear()
    for _ in range(4):
        with pytest.raises(PacsError, match="SEARCH_FILTER"):
            store.mirror.update()
    assert store.list_images() == [kept]


def test_images_of_others_in_the_folder_are_never_removed(archive, store, tmp_path):
    fetched(archive, store)
    nib.save(nib.Nifti1Image(values(), AFFINE), tmp_path / "mine.nii.gz")
    store.ledger.update_info("mine", {"note": "not from the archive"})
    for _ in range(5):
        store.mirror.update()
    assert "mine" in store.list_images()


@pytest.mark.parametrize("page", [None, 1, 2])
def test_series_are_listed_whole(archive, store, page):
    archive.page = page
    for _ in range(3):
        archive.add(*series())
    found = store.pacs.series({"Modality": "MR"})
    assert len(found) == 3
    assert all(item.instances == 3 for item in found)


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "MONAI_LABEL_DICOMWEB_USERNAME"), (404, "check the address"), (500, "its log")]
)
def test_server_that_refuses_is_named_with_what_to_do(archive, store, status, sentence):
    archive.status = status
    with pytest.raises(PacsError, match=sentence) as caught:
        store.connect()
    assert archive.url in str(caught.value)


def test_server_that_is_down_matters_only_without_copies(archive, store):
    fetched(archive, store)
    archive.stop()
    store.connect()
    with pytest.raises(PacsError, match="cannot be reached"):
        store.mirror.update()


def test_images_are_not_added_or_deleted_over_http(store):
    with pytest.raises(HTTPException, match="400"):
        store.add_image("a", "a.nii.gz", {})
    with pytest.raises(HTTPException, match="400"):
        store.remove_image("a")


def test_state_lies_where_it_was_told_or_beside_the_caches(monkeypatch, tmp_path):
    assert state_folder("http://a/b", tmp_path / "here") == tmp_path / "here"
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path))
    found = state_folder("http://a/b", None)
    assert found.parent == tmp_path
    assert found == state_folder("http://a/b/", None) != state_folder("http://a/c", None)


# --- segmentations that come in --------------------------------------------------------------------------------------


def test_segmentation_is_cut_to_the_open_region_and_taken_once(archive, store, make_store):
    slices, uid = fetched(archive, store)
    query = lease(store, uid)
    item = segmentation(slices, np.array([0, 2, 1], np.uint8)[label()], ["posterior", "ANTERIOR"])
    archive.add(item)
    store.importer.update()
    np.testing.assert_array_equal(merged(store, uid), expected())
    [answer] = store.ledger.answers(uid)
    assert answer.client == "ann"
    assert answer.info["sop_instance_uid"] == item.SOPInstanceUID
    assert store.ledger.query(query).status == "answered"
    kept = pydicom.dcmread(store.importer.kept / f"{item.SOPInstanceUID}.dcm")
    assert kept.PixelData == item.PixelData
    store.importer.update()
    again = make_store()
    again.mirror.update()
    again.importer.update()
    assert len(store.ledger.answers(uid)) == 1
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
    assert len(store.ledger.answers(uid)) == 1
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
    ("make", "sentence"), [(strange, "'Tumour'"), (broken, "cannot be read"), (painted, "query_region")]
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
    assert len(store.ledger.answers(uid)) == 1


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
