# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import os

import nibabel as nib
import numpy as np
import pytest

from lib.models.recipe import RecipeError
from lib.options import AppOptions
from lib.planning.bundle_choice import BUNDLE_OF, choose_bundle, load_bundles
from lib.planning.planner import Budget
from tests.lib.training.test_bundles import ROOT

CPU, GPU = Budget("cpu", 8.0), Budget("cuda", 8.0)
TWO, THREE, BETWEEN = BUNDLE_OF["2d"], BUNDLE_OF["3d_fullres"], BUNDLE_OF["3d_anisotropic"]


def scans(folder, count, shape, spacing):
    """Images of `shape` whose voxels are `spacing` mm apart, by id."""
    files = {f"s{i}": folder / f"s{i}.nii.gz" for i in range(count)}
    for path in files.values():
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([*spacing, 1])), path)
    return files


def test_unreadable_images_are_passed_over_and_without_any_it_is_three_dimensions(tmp_path):
    images = scans(tmp_path, 2, (60, 60, 8), (1, 1, 6))
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    gone = tmp_path / "gone.nii.gz"
    assert choose_bundle({**images, "broken": broken, "gone": gone}, tmp_path / "models", CPU)[0] == TWO
    assert choose_bundle({"broken": broken}, tmp_path / "models", CPU) == (
        THREE,
        "no image could be read yet; it suits most 3D scans",
    )


def test_the_device_counts(tmp_path):
    images = scans(tmp_path, 2, (130, 130, 130), (1, 1, 1))
    assert choose_bundle(images, tmp_path / "models", CPU)[0] == TWO
    assert choose_bundle(images, tmp_path / "models", GPU)[0] == THREE


def test_a_project_keeps_the_bundle_it_trained_last(tmp_path):
    images = scans(tmp_path, 2, (60, 60, 8), (1, 1, 6))
    for age, name in enumerate((THREE, BETWEEN)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "current.json").write_text("{}")
        os.utime(tmp_path / "models" / name / "current.json", (1000 - age, 1000 - age))
    assert choose_bundle(images, tmp_path / "models", CPU) == (THREE, "the project has a model trained with it")


def test_named_bundles_are_loaded_in_their_order_and_auto_among_them_once(tmp_path):
    images = scans(tmp_path, 2, (60, 60, 8), (1, 1, 6))

    def loaded(models):
        options = AppOptions(models=models)
        return load_bundles(options, ROOT / "bundles", images, tmp_path / "models", [tmp_path])

    bundles, why = loaded("auto")
    assert list(bundles) == [TWO]
    assert bundles[TWO].configuration == "2d"
    assert "slices are 6.0 times" in why[TWO]
    assert loaded(f"{THREE},auto")[1] == {THREE: "as asked for", TWO: why[TWO]}
    assert list(loaded(f"{TWO},auto")[0]) == [TWO]
    with pytest.raises(RecipeError, match="no bundle nothing in "):
        loaded("nothing")
