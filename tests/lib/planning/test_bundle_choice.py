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
from lib.planning.resolution import choose_configuration
from tests.lib.training.test_bundles import ROOT

TWO, THREE, BETWEEN = BUNDLE_OF["2d"], BUNDLE_OF["3d_fullres"], BUNDLE_OF["3d_anisotropic"]


def scans(folder, count, shape, spacing):
    """Images of `shape` whose voxels are `spacing` mm apart, by id."""
    files = {f"s{i}": folder / f"s{i}.nii.gz" for i in range(count)}
    for path in files.values():
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([*spacing, 1])), path)
    return files


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((35, 50, 36), (1, 1, 1), "3d_fullres"),
        ((220, 256, 10), (1.4, 1.4, 10), "2d"),
        ((10, 256, 220), (10, 1.4, 1.4), "2d"),
        ((300, 300, 31), (0.6, 0.6, 1.8), "2d"),
        ((300, 300, 32), (0.6, 0.6, 1.8), "3d_anisotropic"),
        ((300, 300, 12), (0.6, 0.6, 1.7), "3d_fullres"),
        ((582, 582, 95), (0.6875, 0.6875, 5), "3d_anisotropic"),
    ],
)
def test_the_configuration_follows_thickness_and_number_of_slices(shape, spacing, expected):
    assert choose_configuration([shape] * 3, [spacing] * 3)[0] == expected


def test_the_median_image_decides_and_the_reason_has_its_figures():
    shapes, spacings = [(200, 200, 12)] * 3 + [(90, 90, 90)], [(1.0, 1.0, 8.0)] * 3 + [(1.0, 1.0, 1.0)]
    found, why = choose_configuration(shapes, spacings)
    assert found == "2d"
    assert why.startswith("slices are 8.0 times as far apart as their voxels, and the median image has 12 of them")


def test_unreadable_images_are_passed_over_and_without_any_it_is_three_dimensions(tmp_path):
    images = scans(tmp_path, 2, (60, 60, 8), (1, 1, 6))
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    gone = tmp_path / "gone.nii.gz"
    assert choose_bundle({**images, "broken": broken, "gone": gone}, tmp_path / "models")[0] == TWO
    assert choose_bundle({"broken": broken}, tmp_path / "models") == (
        THREE,
        "no image could be read yet; it suits most 3D scans",
    )


def test_a_project_keeps_the_bundle_it_trained_last(tmp_path):
    images = scans(tmp_path, 2, (60, 60, 8), (1, 1, 6))
    for age, name in enumerate((THREE, BETWEEN)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "current.json").write_text("{}")
        os.utime(tmp_path / "models" / name / "current.json", (1000 - age, 1000 - age))
    assert choose_bundle(images, tmp_path / "models") == (THREE, "the project has a model trained with it")


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
