# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pseudo labels between annotated slices, against published arrays and by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lib.pseudo_labels import fill_between, interpolate, signed_distance


@pytest.fixture(scope="session")
def golden(reference: Path) -> Path:
    return reference / "active_segmentation"


def test_published_interpolation(golden: Path) -> None:
    arrays = np.load(golden / "interpolation.npz")
    for slices in (3, 5, 10):
        mine = interpolate(arrays["top"], arrays["bottom"], slices - 2)
        np.testing.assert_array_equal(mine, arrays[f"sd_multi_{slices}"])
    np.testing.assert_array_equal(signed_distance(arrays["signed_dist_1d_mask"]), arrays["signed_dist_1d_value"])
    empty = np.zeros((32, 32), int)
    np.testing.assert_array_equal(interpolate(empty, empty, 3), arrays["both_empty"])


def test_blocks_without_interpolation() -> None:
    a, b = np.zeros((8, 8), int), np.zeros((8, 8), int)
    a[:3, :3], b[5:, 5:] = 1, 1
    assert interpolate(a, b, 2) is None
    assert interpolate(a, np.zeros_like(a), 2) is None
    assert interpolate(a, a, 0).shape == (0, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        interpolate(a, b[1:], 2)
    with pytest.raises(ValueError, match="zero or more"):
        interpolate(a, b, -1)
    with pytest.raises(ValueError, match="signed_distance or morphological"):
        interpolate(a, b, 1, "linear")


def test_morphological_labels_come_from_a_volume_of_the_outer_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    def grown(volume: np.ndarray) -> np.ndarray:
        assert [plane.any() for plane in volume] == [True, False, False, True]
        return np.maximum.accumulate(volume)

    itk = SimpleNamespace(
        image_from_array=lambda array: array,
        array_from_image=lambda image: image,
        morphological_contour_interpolator=grown,
    )
    monkeypatch.setitem(sys.modules, "itk", itk)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    top, bottom = np.zeros((4, 4), int), np.zeros((4, 4), int)
    top[1, :2], bottom[1, 1:3] = 3, 3
    np.testing.assert_array_equal(interpolate(top, bottom, 2, "morphological"), [top, top])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install itk-morphologicalcontourinterpolation"):
        interpolate(top, bottom, 2, "morphological")


# Loading itk takes longer than everything else in this file.
@pytest.mark.slow
def test_morphological_labels_are_the_published_ones(golden: Path) -> None:
    arrays = np.load(golden / "interpolation.npz")
    for slices in (3, 5, 10):
        mine = interpolate(arrays["top"], arrays["bottom"], slices - 2, "morphological")
        np.testing.assert_array_equal(mine, arrays[f"morph_multi_{slices}"])


def test_slices_between_annotated_ones_are_filled_where_nothing_is_annotated(golden: Path) -> None:
    arrays = np.load(golden / "interpolation.npz")
    label = np.full((32, 32, 12), 255, np.uint8)
    label[..., 1], label[..., 5], label[..., 11] = arrays["top"], arrays["bottom"], arrays["top"]
    label[3, 4, 2] = 2
    filled = fill_between(label, thickness=5)
    expected = np.moveaxis(arrays["sd_multi_5"], 0, -1).astype(np.uint8)
    expected[3, 4, 0] = 2
    np.testing.assert_array_equal(filled[..., 2:5], expected)
    np.testing.assert_array_equal(np.delete(filled, [2, 3, 4], axis=2), np.delete(label, [2, 3, 4], axis=2))
    turned = fill_between(np.moveaxis(label, 2, 0), thickness=5, axis=0)
    np.testing.assert_array_equal(np.moveaxis(turned, 0, 2), filled)


def test_a_slice_without_background_is_symmetric() -> None:
    full = np.ones((7, 7), bool)
    found = signed_distance(full)
    np.testing.assert_allclose(found[3], [1.5, 2.5, 3.5, 4.5, 3.5, 2.5, 1.5])
    np.testing.assert_array_equal(found, found[::-1])
    np.testing.assert_array_equal(found, found.T)
    smaller = np.zeros((7, 7), np.uint8)
    smaller[2:5, 2:5] = 1
    between = interpolate(full.astype(np.uint8), smaller, 1)
    assert between is not None
    np.testing.assert_array_equal(between[0], between[0][::-1])
    assert between[0][1:6, 1:6].all()
