# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A datastore on a stand-in archive: fixtures and helpers for the tests of its parts."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monailabel.config import settings

from lib.dicom.datastore import DicomDatastore
from lib.dicom.web_client import DicomWebClient
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.regions import Region
from tests.lib.dicom.archive import Archive
from tests.lib.dicom.objects import CLASSES, SHAPE, series

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
        return DicomDatastore(tmp_path, CLASSES, ledger, DicomWebClient(archive.url))

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
    store.ledger.leases.lease([query.id], client, 60)
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
