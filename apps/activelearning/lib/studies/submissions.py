# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Handling of a submission: the raw file is kept, its region is cut out, merged and recorded; all or nothing."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.agreement import class_agreement
from lib.frames import check_frame_segment
from lib.ledger.queries import QueryLedger
from lib.ledger.records import ANONYMOUS, DERIVED, Agreement, Answer
from lib.ledger.store import LeaseError
from lib.partial_labels import (
    ClasswiseLabels,
    LabelError,
    LabelMap,
    check_label_info,
    merge,
    remap_by_name,
    settle_values,
    unlabelled,
)
from lib.regions import Region, Triple, triple
from lib.storage.atomic_files import atomic_path, file_digest
from lib.storage.class_labels import load_classes
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import LABEL_EXTENSIONS, Grid, Volume, image_geometry, image_grid, load_label
from lib.studies.file_cache import FileCache, Stamped
from lib.studies.merged_labels import MergedLabels

logger = logging.getLogger(__name__)

Geometry = Callable[[str], tuple[Triple, NDArray[np.float64]]]


class SubmissionStore:
    """Submissions of annotators and the merged label maps made from them.

    A save is safe by its order: the raw file is on disk before the ledger records it, and the ledger has committed
    before the merged label changes. If the server is killed in between, the label is rebuilt from the raw files
    (`repair`). The submission is checked before any write. A save merges only its own regions into the label on disk,
    if the ledger records that this file contains every earlier answer. Otherwise the label is rebuilt.

    A label is read and changed under the image's lock (`MergedLabels.locked`), so that requests and a training that
    repairs labels may run concurrently.

    Args:
        state: folder for the raw files (`raw/`).
        merged: folder of the merged label maps (tag `final`).
        classes: class name -> id.
        ledger: the record.
        ignored: values of voxels without annotation, beside UNLABELLED, in files without names.
    """

    def __init__(
        self,
        state: Path,
        merged: Path,
        classes: Mapping[str, int],
        ledger: QueryLedger,
        ignored: Collection[int] = (),
    ) -> None:
        self.state = state
        self.merged = merged
        self.labels = MergedLabels(merged, state / "locks")
        self.classes = classes
        self.ledger = ledger
        self.ignored = frozenset(ignored)
        self._digests = FileCache[str](ledger, ":label", file_digest, str)

    def save(self, image_id: str, image: Path, submitted: Path, info: Mapping[str, Any]) -> int:
        """Save a submission; return the number of the answer.

        `info` may hold `queries` (numbers of the regions answered), `whole`, `label_info`, `client_id`, and
        `annotated_classes`: names of the classes that were annotated, if these are not all.

        Raises:
            ImageError: the file is unreadable or lies on another grid than the image.
            LabelError: an unknown class, value or query, or no open region of this client on the image.
            LeaseError: another client holds or has answered a named query, or it was never leased.
        """
        grid = image_grid(image, image_id)
        shape, affine = grid.shape, grid.affine
        label = load_label(submitted, like=grid)
        check_label_info(info.get("label_info"))
        info = _settled(label, info, grid)
        try:
            label_xyz = remap_by_name(label.array_xyz, info.get("label_info"), self.classes, self.ignored)
        except LabelError as error:
            raise LabelError(f"{submitted.name}: {error}") from error
        drawn = self._drawn(info)
        if drawn is not None:
            ClasswiseLabels(shape, len(self.classes)).add(label_xyz, [], drawn)
        client = str(info.get("client_id") or ANONYMOUS)
        regions = self._regions(image_id, shape, info, client)
        asked = self.ledger.asked(image_id)
        check_frame_segment(label.array_xyz, info.get("label_info"), [region for _, region in regions], asked)
        with self.labels.locked(image_id):
            self._adopt(image_id, grid)
            current_xyz = None if drawn is not None else self._current(image_id, shape)
            boxes = [region for _, region in regions]
            merged_xyz = None if current_xyz is None else merge(current_xyz, label_xyz, boxes)
            agreements = self._agreements(label_xyz, drawn, client, boxes)
            answer = self._record(image_id, submitted, info, client, regions, agreements)
            if merged_xyz is None:
                self._rebuild(image_id, shape, affine)
            else:
                self.ledger.answers.mark_merged(image_id, answer, self.labels.write(image_id, merged_xyz, affine))
        return answer

    def _current(self, image_id: str, shape: Triple) -> LabelMap | None:
        """The label of all active answers so far if it can be had without them, else None."""
        last = self.ledger.answers.last(image_id)
        if not last:
            return unlabelled(shape)
        held, sha256 = self.ledger.answers.merged(image_id)
        if held != last or sha256 is None or self.ledger.answers.is_classwise(image_id):
            return None
        return self.labels.read(image_id, shape, sha256)

    def rebuild(self, image_id: str, shape: Triple, affine: NDArray[np.float64]) -> LabelMap:
        """Rebuild the merged label from the raw files of every active answer, oldest first.

        If all answers have been withdrawn, the file is removed, since no voxel is annotated.

        Raises:
            ImageError: a raw file is missing or changed.
        """
        with self.labels.locked(image_id):
            return self._rebuild(image_id, shape, affine)

    def _rebuild(self, image_id: str, shape: Triple, affine: NDArray[np.float64]) -> LabelMap:
        last = self.ledger.answers.last(image_id)
        answers, sha256 = self.ledger.answers.of_image(image_id), None
        label_xyz = self._merged(shape, answers)
        if answers:
            sha256 = self.labels.write(image_id, label_xyz, affine)
        elif last:
            self.labels.remove(image_id)
        if last:
            self.ledger.answers.mark_merged(image_id, last, sha256)
        return label_xyz

    def rebuilt(self, image_id: str, shape: Triple) -> LabelMap:
        """Merged label computed from the raw files; nothing is written.

        Raises:
            ImageError: a raw file is missing or changed.
        """
        return self._merged(shape, self.ledger.answers.of_image(image_id))

    def withdraw(self, answer_id: int, geometry: Geometry, client: str | None, reason: str | None = None) -> Answer:
        """Remove an answer from its image's label and return its queries to the pool; record and raw file stay.

        Raises:
            ImageError: a raw file that the rest of the label needs is missing or changed; then nothing changes.
            LeaseError: no such answer, or it was withdrawn before.
        """
        return self._switch(answer_id, geometry, client, reason, active=False)

    def restore(self, answer_id: int, geometry: Geometry, client: str | None, reason: str | None = None) -> Answer:
        """Revert a withdrawal; later answers still take precedence.

        Raises:
            ImageError: a raw file that the label needs is missing or changed; then nothing changes.
            LeaseError: no such answer, or it was not withdrawn.
        """
        return self._switch(answer_id, geometry, client, reason, active=True)

    def _switch(
        self, answer_id: int, geometry: Geometry, client: str | None, reason: str | None, active: bool
    ) -> Answer:
        switch = self.ledger.answers.restore if active else self.ledger.answers.withdraw
        found = self.ledger.answers.get(answer_id)
        if found is None:
            return switch(answer_id, client, reason)
        shape, affine = geometry(found.image)
        with self.labels.locked(found.image):
            kept = self.ledger.answers.of_image(found.image, withdrawn=True)
            self._merged(shape, [a for a in kept if (active if a.id == answer_id else a.active)])
            found = switch(answer_id, client, reason)
            self._rebuild(found.image, shape, affine)
        return found

    def classwise(self, image_id: str, shape: Triple) -> ClasswiseLabels | None:
        """Labels of an image with submissions of only some classes; None for any other image."""
        answers = self.ledger.answers.of_image(image_id)
        return self._classwise(shape, answers) if any(self._drawn(answer.info) for answer in answers) else None

    def _merged(self, shape: Triple, answers: Sequence[Answer]) -> LabelMap:
        if any(self._drawn(answer.info) for answer in answers):
            return self._classwise(shape, answers).merged()
        label_xyz = unlabelled(shape)
        for answer in answers:
            label_xyz = merge(label_xyz, self.answer_label(answer), [region for _, region in answer.regions])
        return label_xyz

    def _classwise(self, shape: Triple, answers: Sequence[Answer]) -> ClasswiseLabels:
        state = ClasswiseLabels(shape, len(self.classes))
        for answer in answers:
            state.add(self.answer_label(answer), [region for _, region in answer.regions], self._drawn(answer.info))
        return state

    def _drawn(self, info: Mapping[str, Any]) -> list[int] | None:
        """Ids of the annotated classes; None for all of them."""
        names = info.get("annotated_classes")
        if names is None:
            return None
        ids = {name.lower(): value for name, value in self.classes.items()}
        if not isinstance(names, list) or not names or any(str(name).lower() not in ids for name in names):
            known = ", ".join(self.classes)
            raise LabelError(f"annotated_classes must be a list of class names, found {names!r}; known are {known}")
        found = sorted({ids[str(name).lower()] for name in names})
        return None if len(found) == len(ids) else found

    def repair(self, image_paths: Mapping[str, Path]) -> list[str]:
        """Rebuild labels that lag behind the ledger, and deleted or changed ones; return the images."""
        kept = {image: self.labels.path(image) for image in self.ledger.answers.images()}
        there = {image: Stamped.of(path) for image, path in kept.items() if path.is_file()}
        digests, expected = self._digests.of(there), self.ledger.answers.merged_digests()
        damaged = [image for image in kept if image not in there or digests[image] != expected.get(image)]
        behind = [image for image in sorted({*self.ledger.answers.unmerged(), *damaged}) if image in image_paths]
        rebuilt = []
        for image in behind:
            try:
                grid = image_geometry(image_paths[image])
            except ImageError as error:
                # The image is left out anyway; its label waits until it can be read again.
                logger.warning("the label of %s was not rebuilt: %s", image, error)
                continue
            self.rebuild(image, *grid)
            rebuilt.append(image)
        return rebuilt

    def answer_label(self, answer: Answer) -> LabelMap:
        """Class ids of one submission, from its raw file.

        Raises:
            ImageError: the raw file is missing or changed.
        """
        path = self.state / "raw" / answer.raw
        if not path.is_file() or file_digest(path) != answer.raw_sha256:
            raise ImageError(f"{path.name}: the raw file of answer {answer.id} is missing or changed; restore a backup")
        label = load_label(path, _grid_of(answer))
        return remap_by_name(label.array_xyz, answer.info.get("label_info"), self.classes, self.ignored)

    def _agreements(
        self, label_xyz: LabelMap, drawn: Sequence[int] | None, client: str, regions: Sequence[Region]
    ) -> list[Agreement]:
        """Dice of every class that two people looked for in the same region."""
        found = []
        for region in regions:
            other = self.ledger.answers.earlier_reading(region, client)
            if other is None:
                continue
            theirs = self._drawn(other.info)
            compared = {
                name: value
                for name, value in self.classes.items()
                if (drawn is None or value in drawn) and (theirs is None or value in theirs)
            }
            other_xyz = self.answer_label(other)[region.slices]
            shared = class_agreement(label_xyz[region.slices], other_xyz, compared)
            found += [Agreement(region, other.id, name, *values) for name, values in shared.items()]
        return found

    def _regions(
        self, image_id: str, shape: Triple, info: Mapping[str, Any], client: str
    ) -> list[tuple[int | None, Region]]:
        whole: list[tuple[int | None, Region]] = [(None, Region(image_id, (0, 0, 0), shape))]
        if info.get("whole") is True:
            return whole
        if info.get("queries"):
            return [self._named(image_id, query, client) for query in _numbers(info["queries"])]
        if not self.ledger.was_asked(image_id):
            return whole
        held = self.ledger.leases.open_queries(image_id, client) or self.ledger.leases.last_worked(image_id, client)
        if not held:
            raise LabelError(
                f"{client} has no open region on {image_id}; ask for the next region first, name the queries, "
                'or send "whole": true to submit the whole image'
            )
        return [(query.id, query.region) for query in held]

    def _named(self, image_id: str, query_id: int, client: str) -> tuple[int | None, Region]:
        query = self.ledger.query(query_id)
        if query is None:
            raise LabelError(f"there is no query {query_id}; the answer for {image_id} was not stored")
        if query.region.image != image_id:
            raise LabelError(f"query {query_id} asks about {query.region.image}, but the label is for {image_id}")
        if query.status in ("proposed", "skipped", "withdrawn"):
            raise LeaseError(f"query {query_id} is {query.status}, so it cannot be answered; ask for the next region")
        # A client without an id is identified by an address only, so it may be the holder of the query.
        if query.status in ("open", "answered") and query.client != client and not client.startswith(DERIVED):
            raise LeaseError(
                f"query {query_id} is {query.status} by {query.client}, not by {client}; ask for the next region"
            )
        return query.id, query.region

    def _adopt(self, image_id: str, grid: Grid) -> None:
        """Records a label that lay in the folder before its first answer, so that a rebuild keeps it."""
        existing = next((p for p in (self.merged / f"{image_id}{e}" for e in LABEL_EXTENSIONS) if p.is_file()), None)
        if existing is None or self.ledger.answers.last(image_id):
            return
        load_classes(existing, self.classes, grid, self.ignored)
        info = _settled(load_label(existing, grid), {"adopted": True}, grid)
        self._record(image_id, existing, info, None, [(None, Region(image_id, (0, 0, 0), grid.shape))])

    def _record(
        self,
        image_id: str,
        submitted: Path,
        info: Mapping[str, Any],
        client: str | None,
        regions: list[tuple[int | None, Region]],
        agreements: Sequence[Agreement] = (),
    ) -> int:
        suffix = "".join(submitted.suffixes[-2:]) if submitted.name.endswith(".nii.gz") else submitted.suffix
        raw = f"{image_id}/{uuid.uuid4().hex}{suffix}"
        target = self.state / "raw" / raw
        with atomic_path(target) as temporary:
            shutil.copyfile(submitted, temporary)
        return self.ledger.answers.record(image_id, raw, file_digest(target), info, client, regions, agreements)


def _settled(label: Volume, info: Mapping[str, Any], grid: Grid) -> Mapping[str, Any]:
    """`info` with the values that its segments have in the file, and the sent values if they differ.

    Names in the file take precedence. Positions in the list of segments count for clients that name no region, such as
    3D Slicer, since these clients are not specific to this project. A file on other axes than its image is stored with
    the grid of its placement.
    """
    sent = info.get("label_info")
    if label.moved:
        info = {**info, "grid": {"shape": grid.shape, "affines": [a.tolist() for a in (grid.affine, *grid.stated)]}}
    if label.label_info is not None:
        return {**info, "label_info": label.label_info, **({"label_info_sent": sent} if sent is not None else {})}
    if info.get("queries") or info.get("whole"):
        return info
    settled = settle_values(label.array_xyz, sent)
    return info if settled == sent else {**info, "label_info": settled, "label_info_sent": sent}


def _grid_of(answer: Answer) -> Grid | None:
    """Grid that the answer's file was put on; None where it had the axes of its image."""
    kept = answer.info.get("grid")
    if kept is None:
        return None
    affine, *stated = (np.array(one, dtype=np.float64) for one in kept["affines"])
    return Grid(triple(kept["shape"]), affine, answer.image, tuple(stated))


def _numbers(queries: Any) -> list[int]:
    if not isinstance(queries, list) or not all(isinstance(q, int) and not isinstance(q, bool) for q in queries):
        raise LabelError(f"queries must be a list of query numbers, found {queries!r}")
    return list(dict.fromkeys(queries))
