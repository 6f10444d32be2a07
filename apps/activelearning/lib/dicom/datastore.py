# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A DICOMweb server as MONAI Label's datastore: copies and state in a local folder, answers also as segmentations."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monailabel.config import settings

from lib.dicom.log_redaction import keep_patients_out, redacted
from lib.dicom.segmentation_import import OWN, SegImporter
from lib.dicom.segmentations import write_segmentation
from lib.dicom.series_mirror import SeriesMirror
from lib.dicom.web_client import DicomWebClient, PacsError
from lib.errors import refuse
from lib.ledger.queries import QueryLedger
from lib.partial_labels import LabelError
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import load_label
from lib.studies.datastore import FINAL, STATE_FOLDER, PartialLabelDatastore

logger = logging.getLogger(__name__)

_STORED = ":stored"


def state_folder(url: str, chosen: Path | None) -> Path:
    """Folder of the copies and of all state: `chosen`, or one for this address beside MONAI Label's DICOM caches."""
    if chosen is not None:
        return chosen.expanduser().resolve()
    caches = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip()
    parent = Path(caches) if caches else Path.home() / ".cache" / "monailabel" / "dicom"
    return (parent / f"patchwise-{hashlib.md5(url.rstrip('/').encode()).hexdigest()}").resolve()


class DicomDatastore(PartialLabelDatastore):
    """The series of a DICOMweb server that match MONAI Label's search filter; an image's id is its SeriesInstanceUID.

    Ledger, raw answers, partial labels, models and moments are in a local folder with the layout of a studies folder,
    beside NIfTI copies of the series. Readers of the folder, such as a training, do not need the server. `watch` starts
    the threads that update copies and answers.

    Args:
        folder: folder of copies and state; created if it is missing.
        poll_seconds: time between two queries of the server.
        store_segmentations: whether saved labels are stored on the server as DICOM segmentations.
    """

    def __init__(
        self,
        folder: Path,
        classes: dict[str, int],
        ledger: QueryLedger,
        pacs: DicomWebClient,
        *,
        poll_seconds: float = 3,
        store_segmentations: bool = True,
    ) -> None:
        super().__init__(folder, classes, ledger)
        keep_patients_out()
        self.pacs = pacs
        self.mirror = SeriesMirror(pacs, folder, ledger, settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER)
        self.importer = SegImporter(pacs, self, classes, folder / STATE_FOLDER / "segmentations")
        self.poll_seconds = poll_seconds
        self.store_segmentations = store_segmentations
        self._troubles: dict[str, str] = {}
        self._unstored: set[str] = set()
        self._wake = threading.Event()

    def name(self) -> str:
        return self.pacs.url

    def description(self) -> str:
        return "Series of a DICOMweb server, with partial labels"

    # --- images ------------------------------------------------------------------------------------------------------

    def image_path(self, image_id: str) -> Path:
        """File of a series; one that is listed but not fetched yet is fetched now.

        Raises:
            PatchwiseError: 404 with the requested name.
            PacsError: the server does not return the series.
            ImageError: the series is not a volume.
        """
        if image_id in self.mirror.listed:
            self.mirror.fetch(image_id)
        return super().image_path(image_id)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        # MONAI Label merges these into a sample's fields, where PatientID holds the caption.
        return {key: value for key, value in super().get_image_info(image_id).items() if key != "PatientID"}

    def with_patient(self, image_id: str, text: str) -> str:
        """A text with the PatientID in place of the series' UID, which has no meaning for annotators."""
        return text.replace(image_id, str(self.ledger.get_info(image_id).get("PatientID", image_id)), 1)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        refuse(f"images come from {self.pacs.url}; store the series there")

    def remove_image(self, image_id: str) -> None:
        refuse(f"images come from {self.pacs.url}; delete the series there, and its copy goes too")

    # --- labels ------------------------------------------------------------------------------------------------------

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        saved = super().save_label(image_id, label_filename, label_tag, label_info)
        if self.tag(label_tag) == FINAL and self.store_segmentations:
            self._unstored.add(image_id)
            self._wake.set()
        return saved

    def save_answer(self, image_id: str, label: Path, info: dict[str, Any]) -> int:
        """Save a submission that is a segmentation from the server; return the number of the answer."""
        answer = self.annotations.save(image_id, self.image_path(image_id), label, info)
        self.ledger.update_info(image_id, info, FINAL)
        if image_id not in self._unstored:
            self.ledger.update_info(image_id, {"answer": answer}, _STORED)
        return answer

    # --- the server --------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Query the server for the first time.

        Raises:
            PacsError: it does not answer and there are no copies.
        """
        try:
            self.mirror.update()
        except PacsError:
            if not self.list_images():
                raise
        stored = self.ledger.infos(_STORED)
        for image in self.ledger.answers.images() if self.store_segmentations else []:
            if self.ledger.answers.last(image) > stored.get(image, {}).get("answer", 0):
                self._unstored.add(image)

    def watch(self) -> None:
        """Start threads that query the server every `poll_seconds`: one for series, one for segmentations."""
        for name, work in (("series", self.mirror.update), ("segmentations", self._exchange)):
            threading.Thread(target=self._repeat, args=(name, work), name=f"pacs-{name}", daemon=True).start()

    def pacs_status(self) -> dict[str, Any]:
        """Status of the server for GET /info/."""
        listed = self.mirror.listed
        return {
            "url": self.pacs.url,
            "search": self.mirror.search,
            "folder": str(self.studies),
            "series": len(listed),
            "fetched": len(self.list_images()),
            "troubles": dict(self._troubles),
            "refused": {uid: sentence for uid, (_, sentence) in list(self.mirror.refused.items()) if uid in listed},
            "segmentations": self.importer.outcomes(),
        }

    def _repeat(self, name: str, work: Callable[[], None]) -> None:
        waiting = self._wake if name == "segmentations" else threading.Event()
        while True:
            try:
                work()
                self._troubles.pop(name, None)
            except PacsError as error:
                if self._troubles.get(name) != str(error):
                    logger.warning("%s", error)
                self._troubles[name] = str(error)
            except Exception as error:
                # If the thread ended, the pool would never be updated again, without any sign of it.
                self._troubles[name] = f"looking for {name} failed: {redacted(error)}"
                logger.error("%s", self._troubles[name])
            waiting.wait(self.poll_seconds)
            waiting.clear()

    def _exchange(self) -> None:
        self.importer.update()
        for image in sorted(self._unstored):
            self._store(image)

    def _store(self, image: str) -> None:
        """Store the label of an image as a segmentation of its series."""
        self._unstored.discard(image)
        answer, path = self.ledger.answers.last(image), self.label_path(image, FINAL)
        facts = self.ledger.get_info(image)
        try:
            if path is not None and "StudyInstanceUID" in facts:
                headers = self.pacs.headers(str(facts["StudyInstanceUID"]), image)
                segmentation = write_segmentation(load_label(path).array_xyz, self.annotations.classes, headers, answer)
                # Recorded before it is sent, so that it is never imported as an annotator's, even after an
                # interruption.
                self.importer.note(str(segmentation.SOPInstanceUID), OWN, image, "written by this server", answer)
                self.pacs.store(segmentation)
            self.ledger.update_info(image, {"answer": answer}, _STORED)
        except (ImageError, LabelError) as error:
            self._troubles[f"storing {image}"] = str(error)
            logger.warning("the label of %s was not stored as a segmentation: %s", image, error)
        except PacsError:
            self._unstored.add(image)
            raise
