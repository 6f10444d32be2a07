# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A studies folder of phantoms with the tasks of one bundle, for tests of training."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from lib.adapters.infer_tasks import SegmentationTask
from lib.adapters.train_task import EnsembleTrainTask
from lib.ledger.queries import QueryLedger
from lib.models.checkpoints import ModelStore
from lib.models.recipe import Bundle
from lib.options import parse_options
from lib.storage.volumes import load_image
from lib.studies.datastore import STATE_FOLDER, PartialLabelDatastore

ROOT = Path(__file__).resolve().parents[3]
CLASSES = {"anterior": 1, "posterior": 2}


def phantoms(out: Path, preset: str) -> Path:
    spec = importlib.util.spec_from_file_location("phantoms", ROOT / "sample-datasets" / "phantoms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.main([str(out), "--preset", preset, "--cases", "4", "--seed", "3"]) == 0
    return out


class World:
    """A studies folder with three images, two of which are partly annotated, and the tasks of one bundle."""

    def __init__(self, studies: Path, source: Path, name: str, **conf: object) -> None:
        studies.mkdir(exist_ok=True)
        for image in sorted((source / "imagesTr").glob("*.nii.gz"))[:3]:
            shutil.copy(image, studies)
        self.options = parse_options({"members": 1, "device": "cpu", "memory": 4, **conf})
        state = studies / STATE_FOLDER
        self.store = PartialLabelDatastore(studies, CLASSES, QueryLedger(state / "ledger.sqlite"))
        for image in sorted((source / "labelsTr").glob("*.nii.gz"))[:2]:
            label = nib.load(image)
            partial = np.asarray(label.dataobj).astype(np.uint8)
            partial[: partial.shape[0] // 3] = 255
            nib.save(nib.Nifti1Image(partial, label.affine), studies / "labels" / "final" / image.name)
        bundle = Bundle(Path(self.options.bundles or ROOT / "bundles") / name)
        models = ModelStore(state / "models", name)
        self.trainer = EnsembleTrainTask(bundle, models, CLASSES, self.options, state)
        self.segmenter = SegmentationTask(bundle, models, CLASSES, self.options)
        self.plan_file = state / f"plan_{name}.yaml"
        self.studies = studies

    def train(self, **request: object) -> dict:
        return self.trainer({"steps": 3, **request}, self.store)

    def predicted(self) -> np.ndarray:
        image = load_image(sorted(self.studies.glob("*.nii.gz"))[2])
        probs = self.segmenter.ensemble().mean(image)
        assert probs.shape == (3, *image.shape)
        return probs
