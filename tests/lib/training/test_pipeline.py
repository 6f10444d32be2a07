# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The pipeline that the server's task and bundles on a folder share: cases, jobs and facts."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lib.models.checkpoints import ModelStore
from lib.models.recipe import Bundle
from lib.partial_labels import UNLABELLED, ClasswiseLabels, LabelError
from lib.training.pipeline import CaseSet, Training
from tests.lib.training.studies import ROOT

CLASSES = {"liver": 1, "lesion": 2}
SHAPE = (8, 8, 8)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    label[:4] = 1
    for name in ("b", "a"):
        write(tmp_path / f"{name}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        write(tmp_path / f"{name}.label.nii.gz", label)
        label = label.copy()
        label[5:7, 5:7, 5:7] = 2
        label[0] = UNLABELLED
    return tmp_path


def write(path, array):
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def files(folder, ending):
    return {name: folder / f"{name}{ending}" for name in ("b", "a")}


def training(folder, **recipe):
    bundle = Bundle(ROOT / "bundles" / "segmentation_dynunet_3d")
    store = ModelStore(folder / "models", bundle.name)
    return Training(bundle, store, CLASSES, bundle.recipe({"steps": 2, **recipe}), (1, 1, 1), 2, 7, 3, ("0" * 64, 1))


def test_cases_are_read_in_order_and_structures_are_measured(folder):
    data = training(folder).build_cases(files(folder, ".nii.gz"), files(folder, ".label.nii.gz"))
    assert [case.name for case in data.cases] == ["a", "b"]
    assert data.voxels == 8**3 + 7 * 8**2
    assert (data.codes, data.smallest_mm3) == ({}, {"lesion": 8})


def test_labels_drawn_class_by_class_are_coded_and_not_measured(folder):
    def classwise(name, shape):
        if name == "b":
            return None
        state = ClasswiseLabels(shape, len(CLASSES))
        state.add(np.zeros(shape, np.uint8), [], [1])
        return state

    data = training(folder).build_cases(files(folder, ".nii.gz"), files(folder, ".label.nii.gz"), classwise)
    assert data.smallest_mm3 == {}
    assert_array_equal(data.cases[0].label_xyz.numpy(), UNLABELLED)


def test_pseudo_labels_fill_between_slices(folder):
    label = np.full(SHAPE, UNLABELLED, np.uint8)
    label[..., 0], label[..., 4] = 1, 1
    write(folder / "a.label.nii.gz", label)
    labels = {"a": folder / "a.label.nii.gz"}
    plain = training(folder).build_cases(files(folder, ".nii.gz"), labels)
    filled = training(folder, pseudo_labels="signed_distance").build_cases(files(folder, ".nii.gz"), labels)
    assert (plain.voxels, filled.voxels) == (2 * 64, 5 * 64)


def test_an_unknown_value_is_refused(folder):
    write(folder / "a.label.nii.gz", np.full(SHAPE, 9, np.uint8))
    with pytest.raises(LabelError):
        training(folder).build_cases(files(folder, ".nii.gz"), files(folder, ".label.nii.gz"))


def test_job_and_facts_say_the_same(folder):
    wanted = training(folder)
    wanted.store.save_member("1" * 64, 0, {})
    job, model = (
        wanted.job("1" * 64, [["a"], ["b"]], {}),
        wanted.publish("1" * 64, CaseSet([], {}, {"lesion": 8.0}, (0, 1))),
    )
    facts = wanted.store.current().facts
    assert facts == model.facts
    assert (job.digest, job.round, job.start, job.recipe) == (facts.digest, facts.round, facts.start, facts.recipe)
    assert (job.seed, job.classes, facts.members) == (7, 2, 2)
    assert (facts.smallest_mm3, facts.one_piece) == ({"lesion": 8}, (0, 1))
