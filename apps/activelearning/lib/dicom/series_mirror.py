# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The series of a DICOMweb server as NIfTI files in a folder, kept up to date."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib

from lib.dicom.series import read_series
from lib.dicom.web_client import DicomWebClient, PacsError, Series
from lib.ledger.queries import QueryLedger
from lib.storage.atomic_files import atomic_path
from lib.storage.volume_headers import ImageError

logger = logging.getLogger(__name__)

# Number of consecutive listings without a series before its copy is removed.
_MISSED = 3
INSTANCES = "instances"
# Whether the instance numbers of a series fall along z.
FALLING = "falling"


class SeriesMirror:
    """Copies of the series that match a search: `<folder>/<SeriesInstanceUID>.nii.gz`, facts in the ledger.

    A series is fetched if two consecutive listings agree on its number of instances, since it may still be in transfer.
    A series that is not a volume is recorded with the reason and ignored until its number of instances changes. If a
    series is removed from the server, its copy is removed too, unless every series seems removed.

    Args:
        folder: folder of the copies; only files of this class are removed.
        search: QIDO-RS keys and values, e.g. `{"Modality": "MR"}`.
    """

    def __init__(self, pacs: DicomWebClient, folder: Path, ledger: QueryLedger, search: Mapping[str, Any]) -> None:
        self.pacs = pacs
        self.folder = folder
        self.ledger = ledger
        self.search = dict(search)
        self.listed: dict[str, Series] = {}
        self.refused: dict[str, tuple[int | None, str]] = {}
        self._missed: dict[str, int] = {}
        self._fetching = threading.Lock()

    def update(self) -> None:
        """One look at the server: lists its series, fetches new ones, removes copies of those that are gone.

        Raises:
            PacsError: the server does not answer, or lists nothing any more.
        """
        before, now = self.listed, {series.uid: series for series in self.pacs.series(self.search)}
        copies = self.copies()
        if not now and copies:
            raise PacsError(
                f"the DICOMweb server {self.pacs.url} lists no series for {self.search} any more; the {len(copies)} "
                "fetched ones are kept: check MONAI_LABEL_DICOMWEB_SEARCH_FILTER and the server"
            )
        self.listed = now
        for uid, series in now.items():
            if uid in before and before[uid].instances == series.instances and self._wanted(series, copies):
                self._try(series)
        for uid in copies:
            self._missed[uid] = 0 if uid in now else self._missed.get(uid, 0) + 1
            if self._missed[uid] >= _MISSED:
                self._path(uid).unlink(missing_ok=True)
                logger.warning("series %s is gone from %s; its copy was removed", uid, self.pacs.url)

    def copies(self) -> dict[str, int | None]:
        """Number of instances of every series whose copy lies in the folder."""
        infos = self.ledger.infos()
        return {
            uid: info.get(INSTANCES)
            for uid, info in infos.items()
            if info.get("SeriesInstanceUID") == uid and self._path(uid).is_file()
        }

    def fetch(self, uid: str) -> bool:
        """Fetch a listed series now if there is no copy yet; return whether there is one afterwards.

        Raises:
            PacsError: the server does not answer.
            ImageError: the series is not a volume.
        """
        series = self.listed.get(uid)
        if series is not None and not self._path(uid).is_file():
            self._fetch(series)
        return self._path(uid).is_file()

    def _wanted(self, series: Series, copies: Mapping[str, int | None]) -> bool:
        if series.uid in self.refused and self.refused[series.uid][0] == series.instances:
            return False
        if series.uid not in copies:
            return True
        if series.instances in (None, copies[series.uid]):
            return False
        if self.ledger.was_asked(series.uid) or self.ledger.answers.last(series.uid):
            sentence = (
                f"series {series.uid} had {copies[series.uid]} instances when its annotation began and has "
                f"{series.instances} now; the first state is kept: store the new one as a series of its own"
            )
            self.refused[series.uid] = series.instances, sentence
            return False
        self._path(series.uid).unlink(missing_ok=True)
        return True

    def _try(self, series: Series) -> None:
        try:
            self._fetch(series)
        except (ImageError, PacsError) as error:
            # An error in one series must not block the others; the next listing reports an unreachable server.
            if isinstance(error, ImageError):
                self.refused[series.uid] = series.instances, str(error)
            logger.warning("%s", error)

    def _fetch(self, series: Series) -> None:
        with self._fetching:
            if self._path(series.uid).is_file():
                return
            with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
                files = self.pacs.download(series.study, series.uid, Path(folder))
                values_xyz, grid = read_series(files)
            facts = {**series.facts, INSTANCES: series.instances, FALLING: grid.falling}
            self.ledger.update_info(series.uid, facts)
            image = nib.Nifti1Image(values_xyz, grid.affine)
            # Rounded positions shear the sform slightly; ITK then uses the qform, which has right angles.
            image.set_qform(grid.affine, code="scanner")
            with atomic_path(self._path(series.uid)) as temporary:
                nib.save(image, temporary)
            self.refused.pop(series.uid, None)
            logger.info("fetched series %s: %s voxels", series.uid, values_xyz.shape)

    def _path(self, uid: str) -> Path:
        return self.folder / f"{uid}.nii.gz"
