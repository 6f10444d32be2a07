# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Counts in label files for the progress page, cached so that each file is read once."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.agreement import class_overlaps
from lib.annotator.predicted_regions import PredictedRegions
from lib.ledger.overview import AnsweredQuery
from lib.ledger.records import Answer
from lib.partial_labels import class_voxels
from lib.storage.volumes import load_label
from lib.studies.datastore import FINAL, PartialLabelDatastore

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS overlaps (query INTEGER, answer INTEGER, content TEXT NOT NULL, PRIMARY KEY (query, answer));
CREATE TABLE IF NOT EXISTS labels (image TEXT PRIMARY KEY, content TEXT NOT NULL);
"""


class Counts:
    """Voxels of each class in every label file, and the overlap of each answer with the model's prediction.

    `catch_up` counts new files and answers, in one thread; all other methods read from memory.

    Args:
        path: the SQLite file of the counts.
        store: labels, answers and the ledger.
        `proposals`: stored predictions of the model.
    """

    def __init__(self, path: Path, store: PartialLabelDatastore, proposals: PredictedRegions) -> None:
        self.path = path
        self.store = store
        self.proposals = proposals
        self.revision = 0
        self.waiting = 0
        self._lock = threading.Lock()
        self._overlaps: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._labels: dict[str, dict[str, Any]] = {}
        self._loaded = False
        self._seen: tuple[Any, ...] = ()
        self._folder_changed = -1

    def overlaps(self) -> dict[tuple[int, int], NDArray[np.int64]]:
        """(query, answer) -> voxels shared, proposed and answered of every class, (C, 3)."""
        with self._lock:
            return dict(self._overlaps)

    def voxels(self) -> dict[str, dict[str, int]]:
        """Image -> annotated voxels of each class, background first."""
        with self._lock:
            return {image: kept["voxels"] for image, kept in self._labels.items()}

    def catch_up(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Count new answers and changed label files, until none is left or `stop` returns true."""
        if not self._loaded:
            self._load()
        answers, labels = self._new_answers(), self._changed_labels()
        self.waiting = len(answers) + len(labels)
        for found in answers:
            if stop():
                return
            self._measure_answer(found)
        for image, stamp in labels.items():
            if stop():
                return
            self._measure_label(image, stamp)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _new_answers(self) -> list[AnsweredQuery]:
        listed = self.proposals.listed()
        state = (self.store.ledger.overview.answers_key(), len(listed), max(listed, default=0))
        if state == self._seen:
            return []
        new = [
            a
            for a in self.store.ledger.overview.answered_queries()
            if a.first in listed and (a.query, a.answer) not in self._overlaps
        ]
        if not new:
            self._seen = state
        return new

    def _measure_answer(self, found: AnsweredQuery) -> None:
        query, answer = self.store.ledger.query(found.query), self.store.ledger.answers.get(found.answer)
        proposed_xyz = self.proposals.get(found.first)
        classes = self.store.annotations.classes
        counts_cv = np.zeros((len(classes), 3), np.int64)
        try:
            assert query is not None, "an answered query is never deleted"
            assert answer is not None, "an answer is never deleted"
            answer_xyz = self.store.annotations.answer_label(answer)[query.region.slices]
            if proposed_xyz is not None and proposed_xyz.shape == answer_xyz.shape:
                counts_cv = class_overlaps(proposed_xyz, answer_xyz, classes)
                counts_cv[~_looked_for(answer, classes)] = 0
        except Exception as error:
            # The audit reports an unreadable raw file; here it is one region less.
            logger.warning("answer %d was not compared with its proposal: %s", found.answer, error)
        with self._lock:
            self._overlaps[found.query, found.answer] = counts_cv
        self._keep("overlaps", (found.query, found.answer), counts_cv.tolist())

    # --- labels ------------------------------------------------------------------------------------------------------

    def _changed_labels(self) -> dict[str, list[int]]:
        folder = self.store.studies / "labels" / FINAL
        changed = folder.stat().st_mtime_ns
        if changed == self._folder_changed:
            return {}
        images = {self.store.get_label_uri(i, FINAL): i for i in self.store.get_labeled_images()}
        found = dict(_stamps(folder, images))
        with self._lock:
            gone = set(self._labels) - set(found)
            for image in gone:
                del self._labels[image]
            new = {i: s for i, s in found.items() if self._labels.get(i, {}).get("stamp") != s}
        for image in gone:
            self._forget(image)
        # A folder that changed within the resolution of the clock could change again unseen, so it is not cached yet.
        if not new and time.time_ns() - changed > 20_000_000:
            self._folder_changed = changed
        return new

    def _measure_label(self, image: str, stamp: list[int]) -> None:
        voxels: dict[str, int] = {}
        try:
            label_xyz = load_label(self.store.get_label_uri(image, FINAL)).array_xyz
            voxels = class_voxels(label_xyz, self.store.annotations.classes)
        except Exception as error:
            logger.warning("the label of %s was not counted: %s", image, error)
        kept = {"stamp": stamp, "voxels": voxels}
        with self._lock:
            self._labels[image] = kept
        self._keep("labels", (image,), kept)

    # --- the file ----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        with self._connect() as connection:
            overlaps = connection.execute("SELECT query, answer, content FROM overlaps").fetchall()
            labels = connection.execute("SELECT image, content FROM labels").fetchall()
        classes = len(self.store.annotations.classes)
        with self._lock:
            for query, answer, content in overlaps:
                counts_cv = np.array(json.loads(content), np.int64)
                if counts_cv.shape == (classes, 3):
                    self._overlaps[query, answer] = counts_cv
            self._labels = {image: json.loads(content) for image, content in labels}
        self._loaded = True
        self.revision += 1

    def _keep(self, table: str, key: tuple[Any, ...], content: Any) -> None:
        marks = ", ".join("?" * (len(key) + 1))
        with self._connect() as connection:
            connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*key, json.dumps(content)))
        self.revision += 1
        self.waiting = max(0, self.waiting - 1)

    def _forget(self, image: str) -> None:
        with self._connect() as connection:
            connection.execute("DELETE FROM labels WHERE image = ?", (image,))
        self.revision += 1

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            # A cache: it is rebuilt after a power failure.
            connection.execute("PRAGMA synchronous=OFF")
            connection.executescript(_SCHEMA)
            yield connection
        finally:
            connection.close()


def _looked_for(answer: Answer, classes: Mapping[str, int]) -> NDArray[np.bool_]:
    """Mask of the annotated classes, (C,); an answer has no information about the others."""
    names = answer.info.get("annotated_classes")
    wanted = {str(name).lower() for name in names} if names else {name.lower() for name in classes}
    return np.array([name.lower() in wanted for name in classes])


def _stamps(folder: Path, images: Mapping[str, str]) -> Iterator[tuple[str, list[int]]]:
    """(image, [bytes, time]) of the label files of known images."""
    for entry in os.scandir(folder):
        image = images.get(entry.path)
        if image is not None:
            stat = entry.stat()
            yield image, [stat.st_size, stat.st_mtime_ns]
