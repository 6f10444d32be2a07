# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pseudo labels between annotated slices, against published arrays and by hand."""

from __future__ import annotations

from pathlib import Path

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
