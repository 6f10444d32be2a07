# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A studies folder with answers, for tests of readers of such folders."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.regions import Region
from lib.studies.submissions import SubmissionStore

CLASSES = {"anterior": 1, "posterior": 2}
SHAPE = (6, 5, 4)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), np.eye(4)), path)
    return path


def geometry(_):
    return SHAPE, np.eye(4)


class Studies:
    """A studies folder with answers of two annotators to one region of `a`, and a class-wise one on `b`."""

    def __init__(self, folder):
        self.folder = folder
        for name in "ab":
            write(folder / f"{name}.nii.gz", np.zeros(SHAPE))
        self.ledger = QueryLedger(folder / ".patchwise" / "ledger.sqlite")
        self.ledger.set_meta("classes", CLASSES)
        final = folder / "labels" / "final"
        self.annotations = SubmissionStore(folder / ".patchwise", final, CLASSES, self.ledger)
        self.label = final / "a.nii.gz"
        asked = [Asked(Region("a", (0, 0, 0), (3, 3, 3)), "patch", None, {})]
        (query,) = self.ledger.ask("b", "random", 0, asked, twice=[0])
        self.ledger.leases.lease([query.id], "ann", 60)
        (second,) = self.ledger.leases.second_readings("ben", 1)
        self.ledger.leases.lease([second.id], "ben", 60)
        one, two = np.zeros(SHAPE), np.zeros(SHAPE)
        one[:2, :3, :3] = two[:1, :3, :3] = 1
        self.answers = [
            self.save("a", one, queries=[query.id], client_id="ann"),
            self.save("a", two, queries=[second.id], client_id="ben"),
        ]
        self.save("b", one, whole=True, annotated_classes=["anterior"])

    def save(self, image, array, **info):
        upload = write(self.folder.parent / "upload" / "label.nii.gz", array)
        return self.annotations.save(image, self.folder / f"{image}.nii.gz", upload, info)

    def raw(self, answer):
        return self.folder / ".patchwise" / "raw" / self.ledger.answers.get(answer).raw
