# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Quality of interpolated slices: the same interpolation as the app's, and Dice by hand."""

import nibabel as nib
import numpy as np
import pandas as pd

from eval.protocol.dataset import Case, Dataset
from eval.reporting.pseudo_label_quality import pseudo_quality, signed_distance_between
from lib.pseudo_labels import interpolate

TRAIN = {"pseudo_labels": "signed_distance", "pseudo_thickness": 5}


def test_interpolation_is_the_apps():
    rng = np.random.default_rng(0)
    for _ in range(20):
        top, bottom = np.zeros((2, 14, 12), np.uint8)
        for value in (1, 2):
            for plane in (top, bottom):
                x, y = rng.integers(1, 7, 2)
                plane[x : x + 5, y : y + 4] = value
        ours, theirs = signed_distance_between(top, bottom, 3), interpolate(top, bottom, 3)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def dataset(folder, label_xyz) -> Dataset:
    path = folder / "a.nii.gz"
    nib.save(nib.Nifti1Image(label_xyz, np.eye(4)), path)
    return Dataset(folder, "d", {"background": 0, "one": 1, "two": 2}, (Case("a", path, path),))


def slices(*indices, method="m", unit="slice"):
    base = {"method": method, "seed": 1, "image": "a", "unit": unit, "x": 0, "y": 0, "dx": 10, "dy": 10, "dz": 1}
    return pd.DataFrame([{**base, "round": 0, "z": z} for z in indices])


def test_quality_by_hand(tmp_path):
    label = np.zeros((10, 10, 9), np.uint8)
    label[2:6, 2:6, :] = 1
    label[2:6, 2:4, 1] = 0  # half of the class is missing in slice 1: Dice 2 * 8 / (8 + 16)
    data = dataset(tmp_path, label)
    table = pseudo_quality(slices(0, 2, 8), data, TRAIN)  # 2 to 8 is thicker than a block
    assert table["slices"].item() == 1
    assert table["one"].item() == 2 * 8 / 24
    assert np.isnan(table["two"].item())
    assert pseudo_quality(slices(0, 8), data, TRAIN).empty
    assert pseudo_quality(slices(0, 2, unit="patch"), data, TRAIN).empty
    assert pseudo_quality(slices(0, 2), data, {"pseudo_labels": "none"}).empty
