# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Series of an archive as images of the pool."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monailabel.config import settings

from lib.dicom.datastore import state_folder
from lib.dicom.web_client import PacsError
from lib.errors import PatchwiseError
from tests.lib.dicom.objects import AFFINE, SHAPE, series, values
from tests.lib.dicom.store import archive, fetched, lease, make_store, store

__all__ = ["archive", "make_store", "store"]  # fixtures


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
    for change in (lambda: store.add_image("a", "a.nii.gz", {}), lambda: store.remove_image("a")):
        with pytest.raises(PatchwiseError) as refused:
            change()
        assert refused.value.status == 400


def test_state_lies_where_it_was_told_or_beside_the_caches(monkeypatch, tmp_path):
    assert state_folder("http://a/b", tmp_path / "here") == tmp_path / "here"
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path))
    found = state_folder("http://a/b", None)
    assert found.parent == tmp_path
    assert found == state_folder("http://a/b/", None) != state_folder("http://a/c", None)
