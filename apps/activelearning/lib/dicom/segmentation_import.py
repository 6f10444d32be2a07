# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Import of segmentations that annotators store in the archive: cut to the queried regions and saved as answers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID

from lib.dicom.log_redaction import redacted
from lib.dicom.segmentations import WRITER, read_segmentation, referenced_series, written_by_dcmjs
from lib.dicom.series_mirror import FALLING, SeriesMirror
from lib.dicom.web_client import DicomWebClient, Series
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Query
from lib.partial_labels import LabelError
from lib.regions import Triple
from lib.storage.atomic_files import atomic_path
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import save_label

logger = logging.getLogger(__name__)

# Tag of the ledger's infos with the outcome of each segmentation, by SOP instance UID.
OUTCOMES = ":segmentation"
IMPORTED, LEFT, OWN = "imported", "left", "own"


class AnswerStore(Protocol):
    """The pool that segmentations answer."""

    mirror: SeriesMirror
    ledger: QueryLedger

    def list_images(self) -> list[str]:
        """Ids of the series in the pool."""
        ...

    def geometry(self, image_id: str) -> tuple[Triple, NDArray[np.float64]]:
        """Shape and affine of an image."""
        ...

    def save_answer(self, image: str, path: Path, info: dict[str, Any]) -> int:
        """Number of the answer that a label file becomes."""
        ...


class SegImporter:
    """Import segmentations of the pool's series, each once.

    A segmentation answers the open regions of its series, or those that its author worked on last there, like a label
    that 3D Slicer submits. The received file is kept under `.patchwise/segmentations`. An unusable one stays in the
    archive, and `outcomes` returns the reason. If it is stored again, it has a new identity and is tried again.

    Args:
        store: pool of the answered images.
        classes: class name -> id.
        kept: folder for the received files.
    """

    def __init__(self, pacs: DicomWebClient, store: AnswerStore, classes: Mapping[str, int], kept: Path) -> None:
        self.pacs = pacs
        self.store = store
        self.classes = classes
        self.ledger: QueryLedger = store.ledger
        self.kept = kept
        self._outcomes: dict[str, dict[str, Any]] = self.ledger.infos(OUTCOMES)
        self._read: dict[str, int | None] = {}

    def update(self) -> None:
        """Query the server once and import new segmentations.

        Raises:
            PacsError: the server does not answer.
        """
        studies = {series.study for series in self.store.mirror.listed.values()}
        for series in self.pacs.series({"Modality": "SEG"}):
            # Segmentations are in the study of their series; others belong to another project.
            known = series.uid in self._read and self._read[series.uid] == series.instances
            if series.study in studies and not known and self._read_series(series):
                self._read[series.uid] = series.instances

    def note(self, instance: str, outcome: str, image: str, detail: str, answer: int | None = None) -> None:
        """Store the outcome of a segmentation."""
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"outcome": outcome, "image": image, "detail": detail, "answer": answer, "at": at}
        self.ledger.update_info(instance, facts, OUTCOMES)
        self._outcomes[instance] = facts

    def outcomes(self, limit: int = 20) -> list[dict[str, Any]]:
        """Outcomes of the latest segmentations, newest first, without the server's own ones."""
        others = [
            {"segmentation": uid, **facts} for uid, facts in list(self._outcomes.items()) if facts["outcome"] != OWN
        ]
        return sorted(others, key=lambda facts: str(facts["at"]), reverse=True)[:limit]

    def _read_series(self, series: Series) -> bool:
        """Import the new instances of a series; return whether none is left for later."""
        done = True
        for instance in self.pacs.instances(series.study, series.uid):
            if instance not in self._outcomes:
                done &= self._look(self.pacs.instance(series.study, series.uid, instance))
        return done

    def _look(self, segmentation: Dataset) -> bool:
        instance = str(segmentation.SOPInstanceUID)
        referenced = referenced_series(segmentation)
        images = set(self.store.list_images())
        image = next((uid for uid in referenced if uid in images), None)
        if not UID(instance).is_valid:
            # It becomes a file's name.
            self.note(instance, LEFT, image or "", f"its SOP instance UID {instance[:80]!r} is none; store it anew")
        elif image is None:
            if any(uid in self.store.mirror.listed for uid in referenced):
                return False  # its series is still being fetched
            self.note(instance, LEFT, "", "it refers to no series of the pool")
        elif str(segmentation.get("ManufacturerModelName", "")) == WRITER:
            self.note(instance, OWN, image, "written by this server, or by another one like it")
        else:
            self._take(instance, image, segmentation)
        return True

    def _take(self, instance: str, image: str, segmentation: Dataset) -> None:
        earlier = [
            a for a in self.ledger.answers.of_image(image, withdrawn=True) if a.info.get("sop_instance_uid") == instance
        ]
        try:
            answer = earlier[0].id if earlier else self._save(instance, image, segmentation)
        except (ImageError, LabelError) as error:
            logger.warning("segmentation %s of %s was left: %s", instance, image, error)
            self.note(instance, LEFT, image, str(error))
            return
        except Exception as error:
            # An error in one object must not prevent the import of others.
            logger.error("segmentation %s of %s cannot be read: %s", instance, image, redacted(error))
            self.note(instance, LEFT, image, f"it cannot be read ({redacted(error)}); store it again")
            return
        logger.info("segmentation %s of %s became answer %d", instance, image, answer)
        self.note(instance, IMPORTED, image, "", answer)

    def _save(self, instance: str, image: str, segmentation: Dataset) -> int:
        # Measured with OHIF 3.10: if instance numbers do not fall along z, the first slice is stored as the last one.
        # The object does not show whether its writer does so.
        if written_by_dcmjs(segmentation) and not self.ledger.get_info(image).get(FALLING):
            raise LabelError(
                "it was written by OHIF, which stores the slices of series that are numbered like this one in the "
                "wrong order, so where it was drawn is not known; draw with another program, such as 3D Slicer"
            )
        queries = self._queries(image, segmentation)
        shape, affine = self.store.geometry(image)
        label_xyz, label_info = read_segmentation(
            segmentation, image, shape, affine, self.classes, [query.region for query in queries]
        )
        with atomic_path(self.kept / f"{instance}.dcm") as temporary:
            segmentation.save_as(temporary, write_like_original=False)
        info: Mapping[str, Any] = {
            "queries": [query.id for query in queries],
            "label_info": label_info,
            "client_id": queries[0].client,
            "sop_instance_uid": instance,
        }
        with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
            path = Path(folder) / f"{image}.nii.gz"
            save_label(path, label_xyz, affine)
            return self.store.save_answer(image, path, dict(info))

    def _queries(self, image: str, segmentation: Dataset) -> list[Query]:
        """The regions that a segmentation answers, all of one client.

        Raises:
            LabelError: no client holds a region there, or several do and the segmentation does not name one of them.
        """
        held = self.ledger.leases.open_queries(image)
        clients = list(dict.fromkeys(str(query.client) for query in held))
        author = str(segmentation.get("ContentCreatorName", "") or "").strip().lower()
        named = [client for client in clients if client.lower() == author]
        if len(clients) > 1 and not named:
            raise LabelError(
                f"{', '.join(clients)} hold regions of this series and the segmentation does not say whose it is: set "
                "its ContentCreatorName to one of them, or give back the other regions, and store it again"
            )
        if clients:
            return [query for query in held if query.client == (named or clients)[0]]
        last = self.ledger.leases.last_holder(image)
        found = self.ledger.leases.last_worked(image, last) if last is not None else []
        if not found:
            raise LabelError("no region of this series is open; ask for the next sample first and store it again")
        return found
