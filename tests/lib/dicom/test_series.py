# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import numpy as np
import pytest

from lib.dicom.series import read_series, series_grid
from lib.storage.volumes import ImageError
from tests.lib.dicom.objects import AFFINE, FIRST, NORMAL, SHAPE, STEP, series, values


def test_axes_and_affine_follow_columns_rows_and_the_normal():
    slices = series()
    grid = series_grid([slices[2], slices[0], slices[1]])
    assert grid.order == (1, 2, 0)
    assert grid.shape == SHAPE
    np.testing.assert_allclose(grid.affine, AFFINE, atol=1e-12)


@pytest.mark.parametrize(("numbers", "falling"), [((1, 2, 3), False), ((3, 2, 1), True), ((3, 1, 2), False)])
def test_direction_of_the_instance_numbers(numbers, falling):
    slices = series()
    for item, number in zip(slices, numbers, strict=True):
        item.InstanceNumber = number
    assert series_grid(slices[::-1]).falling is falling


def test_values_are_rescaled_slice_by_slice(tmp_path):
    slices = series(slope=2, intercept=-7)
    slices[1].RescaleSlope = 3
    files = [tmp_path / f"{name}.dcm" for name in ("c", "a", "b")]
    for file, item in zip(files, slices, strict=True):
        item.save_as(file, write_like_original=False)
    values_xyz, grid = read_series(files[::-1])
    expected = 2 * values().astype(int) - 7
    expected[:, :, 1] = 3 * values()[:, :, 1].astype(int) - 7
    np.testing.assert_array_equal(values_xyz, expected)
    assert values_xyz.dtype == np.int16
    np.testing.assert_allclose(grid.affine, AFFINE, atol=1e-12)


def test_fractions_stay_fractions(tmp_path):
    files = []
    for item in series(slope=0.5, intercept=0):
        files.append(tmp_path / f"{item.InstanceNumber}.dcm")
        item.save_as(files[-1], write_like_original=False)
    values_xyz, _ = read_series(files)
    assert values_xyz.dtype == np.float32
    np.testing.assert_array_equal(values_xyz, values() / 2)


def place(slices, k, along):
    slices[k].ImagePositionPatient = [float(v) for v in FIRST + along]


def colour(slices):
    slices[0].SamplesPerPixel = 3


def frames(slices):
    slices[0].NumberOfFrames = 12


def unplaced(slices):
    del slices[1].ImagePositionPatient


def single(slices):
    del slices[1:]


def mixed(slices):
    slices[1].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]


def gap(slices):
    place(slices, 2, 3 * STEP * NORMAL)


def doubled(slices):
    place(slices, 2, STEP * NORMAL)


def tilted(slices):
    # 3 mm on and 0.6 mm down: an angle of atan(0.2) = 11.3 degrees.
    for k in range(3):
        place(slices, k, k * (STEP * NORMAL + np.array([0, 0, -0.6])))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (colour, "colour"),
        (frames, "several frames a file"),
        (unplaced, "lacks ImagePositionPatient"),
        (single, "one slice"),
        (mixed, "several sizes, spacings or orientations"),
        (gap, "3.00 to 6.00 mm apart"),
        (doubled, "3 slices at 2 positions"),
        (tilted, "tilted by 11.3 degrees"),
    ],
)
def test_what_is_no_volume_is_refused_with_its_name(spoil, sentence):
    slices = series()
    spoil(slices)
    with pytest.raises(ImageError, match=sentence) as caught:
        series_grid(slices)
    assert str(slices[0].SeriesInstanceUID) in str(caught.value)


def test_positions_rounded_by_the_scanner_are_taken():
    slices = series()
    place(slices, 1, (STEP + 0.02) * NORMAL)
    np.testing.assert_allclose(series_grid(slices).affine, AFFINE, atol=1e-12)


def test_pixels_that_cannot_be_decoded_are_named(tmp_path):
    files = []
    for item in series():
        files.append(tmp_path / f"{item.InstanceNumber}.dcm")
        item.save_as(files[-1], write_like_original=False)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_series(files)
