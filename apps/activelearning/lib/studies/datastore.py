# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A studies folder as MONAI Label's datastore: images on disk, labels that may be partial, facts in the ledger."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from numpy.typing import NDArray

from lib.errors import refuse
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Answer
from lib.models.class_names import unlabelled_values
from lib.regions import Triple
from lib.storage.atomic_files import atomic_path, file_digest, folded
from lib.storage.volumes import EXTENSIONS, LABEL_EXTENSIONS, SEGMENTATION, check_image, check_label_file, image_grid
from lib.studies.file_cache import FileCache, Stamped
from lib.studies.folder_listing import FolderListing, split_name
from lib.studies.image_checks import Geometry, ImageChecks
from lib.studies.request_context import SAVED_ANSWER, as_sent, current_client
from lib.studies.submissions import SubmissionStore
from lib.studies.unused_files import unused_files

FINAL = DefaultLabelTag.FINAL.value
STATE_FOLDER = ".patchwise"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}")


class PartialLabelDatastore(Datastore):
    """Images `<studies>/<id>.nii.gz` and labels `<studies>/labels/<tag>/<id>.nii.gz`, in MONAI Label's layout.

    Labels under tag `final` go through `SubmissionStore`: only the queried regions become labelled. Infos that clients
    store about images are in the ledger, so that an update does not rewrite a file that grows with the pool, and two
    processes may write.

    Args:
        studies: the folder; created if it is missing.
        classes: class name -> id.
        ledger: the record of queries and answers.
    """

    def __init__(self, studies: Path, classes: dict[str, int], ledger: QueryLedger) -> None:
        self.studies = studies
        self.ledger = ledger
        self._images = FolderListing(studies)
        self._labels: dict[str, FolderListing] = {}
        self._lock = threading.Lock()
        self._digests = FileCache[str](ledger, ":sha256", file_digest, str)
        self._checks = ImageChecks(ledger)
        for tag in (FINAL, DefaultLabelTag.ORIGINAL.value):
            (studies / "labels" / tag).mkdir(parents=True, exist_ok=True)
        ignored = unlabelled_values(studies)
        self.annotations = SubmissionStore(studies / STATE_FOLDER, studies / "labels" / FINAL, classes, ledger, ignored)

    def name(self) -> str:
        return self.studies.name

    def set_name(self, name: str) -> None:
        refuse("the name of a studies folder is the folder's; rename the folder")

    def description(self) -> str:
        return "Images and partial labels of a studies folder"

    def set_description(self, description: str) -> None:
        refuse("the description of a studies folder cannot be changed")

    # --- images ------------------------------------------------------------------------------------------------------

    def list_images(self) -> list[str]:
        return list(self._images.files())

    def image_path(self, image_id: str) -> Path:
        """File of an image.

        Raises:
            PatchwiseError: 404 with the requested name.
        """
        path = self._images.path(image_id)
        if path is None:
            refuse(f"no image {image_id!r} in {self.studies.name}; GET /datastore/ lists the images", 404)
        return path

    def get_image(self, image_id: str, params: Any = None) -> Any:
        return io.BytesIO(self.image_path(image_id).read_bytes())

    def get_image_uri(self, image_id: str) -> str:
        return str(self.image_path(image_id))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        path = self.image_path(image_id)
        return {**self.ledger.get_info(image_id), "name": path.name, "path": str(path)}

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        source = Path(image_filename)
        stem, extension = split_name(source.name) or refuse(
            f"{source.name}: images must end in {', '.join(EXTENSIONS)}, and {SEGMENTATION} is no image"
        )
        image_id = _checked_name(image_id or stem, "image")
        with as_sent(source):
            check_image(source, uploaded=True)
        taken = next((known for known in self.list_images() if folded(known) == folded(image_id)), None)
        if taken is not None:
            refuse(f"there is an image {taken!r} already; choose another name or delete it first", 409)
        with atomic_path(self.studies / f"{image_id}{extension}") as temporary:
            shutil.copyfile(source, temporary)
        self.ledger.update_info(image_id, image_info or {})
        return image_id

    def remove_image(self, image_id: str) -> None:
        path = self.image_path(image_id)
        if self.ledger.answers.of_image(image_id):
            refuse(f"image {image_id!r} has annotations; withdraw them before deleting it", 409)
        path.unlink()

    # --- labels ------------------------------------------------------------------------------------------------------

    def tag(self, name: str) -> str:
        """A tag in the spelling that it has here: names are one where a file system may take them for one folder.

        Raises:
            PatchwiseError: 400: not usable as a name.
        """
        if name in (FINAL, DefaultLabelTag.ORIGINAL.value):
            return name
        wanted = folded(_checked_name(name, "tag"))
        known = (FINAL, DefaultLabelTag.ORIGINAL.value, *self.tags())
        return next((tag for tag in known if folded(tag) == wanted), name)

    def _listing(self, tag: str) -> FolderListing:
        tag = self.tag(tag)
        with self._lock:
            if tag not in self._labels:
                listing = FolderListing(self.studies / "labels" / tag, labels=True)
                if not listing.folder.is_dir():
                    return listing  # not cached: clients may request any tag
                self._labels[tag] = listing
            return self._labels[tag]

    def tags(self) -> list[str]:
        """Tags that have a folder, sorted."""
        return sorted(p.name for p in (self.studies / "labels").iterdir() if p.is_dir() and _NAME.fullmatch(p.name))

    def label_path(self, label_id: str, tag: str) -> Path | None:
        """File of a label, or None."""
        return self._listing(tag).path(label_id)

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        return {tag: image_id for tag in self.tags() if self.label_path(image_id, tag)}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        return image_id if self.label_path(image_id, tag) else ""

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> Any:
        path = self.label_path(label_id, label_tag)
        return io.BytesIO(path.read_bytes()) if path else None

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        return str(self.label_path(label_id, label_tag) or "")

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        return self.ledger.get_info(label_id, self.tag(label_tag))

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        labelled = self._listing(label_tag or FINAL).files()
        return [image for image in self.list_images() if image in labelled]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        labelled = self._listing(label_tag or FINAL).files()
        return [image for image in self.list_images() if image not in labelled]

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a submission; under `final` only its queries' regions become labelled (see `SubmissionStore.save`)."""
        image = self.image_path(image_id)
        tag = self.tag(label_tag)
        source = Path(label_filename)
        info = dict(label_info or {})
        here = current_client()
        if here and not info.get("client_id"):
            info["client_id"] = here
        if split_name(source.name, labels=True) is None:
            endings = ", ".join(LABEL_EXTENSIONS)
            refuse(f"label for {image_id}: files must end in {endings}, found {source.suffix or 'none'}")
        SAVED_ANSWER.set(None)
        if tag == FINAL:
            with as_sent(source):
                SAVED_ANSWER.set(self.annotations.save(image_id, image, source, info))
        else:
            with as_sent(source):
                check_label_file(source, image_grid(image, image_id))
            extension = next(e for e in reversed(LABEL_EXTENSIONS) if source.name.endswith(e))
            with atomic_path(self.studies / "labels" / tag / f"{image_id}{extension}") as temporary:
                shutil.copyfile(source, temporary)
        self.ledger.update_info(image_id, info, tag)
        return image_id

    def withdraw_answer(self, answer_id: int, client: str, reason: str | None = None) -> Answer:
        """Remove an answer from its image's label; it can be restored."""
        return self.annotations.withdraw(answer_id, self.geometry, client, reason)

    def restore_answer(self, answer_id: int, client: str, reason: str | None = None) -> Answer:
        """Revert a withdrawal."""
        return self.annotations.restore(answer_id, self.geometry, client, reason)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        path = self.label_path(label_id, label_tag)
        if path is None:
            refuse(f"no label of {label_id!r} under tag {label_tag!r}", 404)
        if self.tag(label_tag) == FINAL and self.ledger.answers.of_image(label_id):
            refuse(f"the label of {label_id!r} is built from recorded answers and cannot be deleted as a file", 409)
        path.unlink()

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        self.image_path(image_id)
        # MONAI Label records each served sample here; the ledger's leases contain this and more.
        kept = {key: value for key, value in info.items() if key != "strategy"}
        if kept:
            self.ledger.update_info(image_id, kept)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        self.image_path(label_id)
        self.ledger.update_info(label_id, info, self.tag(label_tag))

    # --- lists -------------------------------------------------------------------------------------------------------

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        pairs = [
            {"image": str(self.image_path(i)), "label": self.get_label_uri(i, FINAL)} for i in self.get_labeled_images()
        ]
        if full_path:
            return pairs
        return [{k: str(Path(v).relative_to(self.studies)) for k, v in pair.items()} for pair in pairs]

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        pairs = self.datalist()[: limit_cases or None]
        if not pairs:
            refuse("no annotated image yet, so there is nothing to put into an archive", 404)
        with (
            tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as stream,
            zipfile.ZipFile(stream, "w") as archive,
        ):
            for pair in pairs:
                for kind, path in pair.items():
                    archive.write(path, arcname=f"{kind}/{Path(path).name}")
            archive.writestr("metadata.json", json.dumps(self.json()))
        return stream.name

    def refresh(self) -> None:
        with self._lock:
            self._images = FolderListing(self.studies)
            self._labels.clear()

    def status(self) -> dict[str, Any]:
        counts = {tag: len(self._listing(tag).files()) for tag in self.tags()}
        return {
            "total": len(self.list_images()),
            "completed": len(self.get_labeled_images()),
            "label_tags": {tag: count for tag, count in counts.items() if count},
        }

    def json(self) -> dict[str, Any]:
        tags = self.tags()
        infos, labels = (
            {tag: self.ledger.infos(tag) for tag in ("", *tags)},
            {t: self._listing(t).files() for t in tags},
        )
        objects = {
            image: {
                "image": {"ext": extension, "info": infos[""].get(image, {})},
                "labels": {
                    tag: {"ext": ext, "info": infos[tag].get(image, {})}
                    for tag in tags
                    if (ext := labels[tag].get(image))
                },
            }
            for image, extension in self._images.files().items()
        }
        return {"name": self.name(), "description": self.description(), "objects": objects}

    # --- facts about image files -------------------------------------------------------------------------------------

    def image_files(self) -> dict[str, Stamped]:
        """Every image's file as it is now."""
        return self._images.stamped()

    def digests(self, files: Mapping[str, Stamped]) -> dict[str, str]:
        """SHA-256 of image files; each is read once until its size or time changes."""
        return self._digests.of(files)

    def geometries(self, files: Mapping[str, Stamped]) -> dict[str, Geometry]:
        """Shape, affine and spacing of image files; each header is read once until the file changes.

        Raises:
            ImageError: a file that cannot be used.
        """
        return self._checks.geometries(files)

    def pool(self) -> tuple[dict[str, Stamped], dict[str, Geometry]]:
        """Files and grids of the images that can be used, as far as their headers and earlier looks show."""
        files = self.image_files()
        grids, _ = self._checks.usable(files)
        return {image: files[image] for image in grids}, grids

    def unusable(self, images: Iterable[str]) -> dict[str, str]:
        """Sentence about every one of these images that cannot be used, once its voxels have been read."""
        files = self.image_files()
        return self._checks.read({image: files[image] for image in images if image in files})

    def leave_out(self, image: str, file: Stamped, sentence: str) -> None:
        """Keep an image out of queries, scorings and trainings until its file changes."""
        self._checks.note(image, file, sentence)

    def unused(self) -> dict[str, str]:
        """Sentence about every file and folder that is not an image, by name; the log has each once."""
        found = unused_files(self.studies)
        for sentence in found.values():
            self._checks.log_once(sentence)
        return found

    def left_out(self) -> dict[str, str]:
        """Sentence about every file and folder here that is not used, by name."""
        files = self.image_files()
        _, wrong = self._checks.usable(files)
        unused = self.unused()
        images = {Path(files[image].path).name: sentence for image, sentence in wrong.items()}
        return dict(sorted({**unused, **images}.items()))

    def image_digest(self, image_id: str) -> str:
        """SHA-256 of an image file."""
        return self.digests({image_id: Stamped.of(self.image_path(image_id))})[image_id]

    def geometry(self, image_id: str) -> tuple[Triple, NDArray[np.float64]]:
        """Shape and affine of an image."""
        found = self.geometries({image_id: Stamped.of(self.image_path(image_id))})[image_id]
        return found.shape, found.affine


def _checked_name(name: str, what: str) -> str:
    """A name that is safe as part of a path."""
    if not _NAME.fullmatch(name) or ".." in name:
        refuse(f"{what} {name[:80]!r} is not usable as a name: letters, digits, '_', '-' and '.', at most 200")
    return name


__all__: Sequence[str] = ("FINAL", "STATE_FOLDER", "PartialLabelDatastore")
