# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import itertools

import numpy as np
import pytest

from lib.annotator.markups import box_in_mm, roi_document
from lib.regions import Region
from lib.storage.volumes import ImageError

# Turned about the axis of the patient by the angle of a 3-4-5 triangle; voxels of 2 x 1 x 3 mm.
OBLIQUE = np.array([[1.6, -0.6, 0, 10], [1.2, 0.8, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]], dtype=float)
REGION = Region("a", (4, 2, 1), (3, 4, 2))


def corners(centre, size, axes):
    """The eight corners of a box, as computed by a reader of the file."""
    signs = itertools.product((-0.5, 0.5), repeat=3)
    return np.array([centre + axes @ (np.array(s) * size) for s in signs])


def test_corners_of_an_oblique_region_by_hand():
    # x = 1.6 i - 0.6 j + 10, y = 1.2 i + 0.8 j - 20, z = 3 k + 5 in RAS; i of 3.5 and 6.5, j of 1.5 and 5.5,
    # k of 0.5 and 2.5; x and y negated in LPS.
    by_hand = [
        (-14.7, 14.6, 6.5), (-14.7, 14.6, 12.5), (-12.3, 11.4, 6.5), (-12.3, 11.4, 12.5),
        (-19.5, 11.0, 6.5), (-19.5, 11.0, 12.5), (-17.1, 7.8, 6.5), (-17.1, 7.8, 12.5),
    ]  # fmt: skip
    assert np.allclose(corners(*box_in_mm(REGION, OBLIQUE)), by_hand, atol=1e-9)


def test_the_document_holds_centre_size_orientation_and_text():
    document = roi_document([REGION], ["axial 1-2, region 1 of 4"], OBLIQUE)
    (roi,) = document["markups"]
    assert document["@schema"].endswith("markups-schema-v1.0.3.json#")
    assert (roi["type"], roi["roiType"], roi["coordinateSystem"], roi["coordinateUnits"]) == ("ROI", "Box", "LPS", "mm")
    assert roi["center"] == pytest.approx([-15.9, 11.2, 9.5])
    assert roi["size"] == pytest.approx([6, 4, 6])
    assert roi["orientation"] == pytest.approx([-0.8, 0.6, 0, -0.6, -0.8, 0, 0, 0, 1])
    assert roi["locked"]
    assert roi["name"] == roi["controlPoints"][0]["label"] == "axial 1-2, region 1 of 4"
    assert roi["controlPoints"][0]["position"] == roi["center"]


def test_every_region_is_a_box_of_its_own():
    document = roi_document([REGION, Region("a", (0, 0, 0), (1, 1, 1))], ["one", "two"], OBLIQUE)
    assert [roi["name"] for roi in document["markups"]] == ["one", "two"]
    assert document["markups"][1]["center"] == pytest.approx([-10, 20, 5])
    assert document["markups"][1]["size"] == pytest.approx([2, 1, 3])


@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_boxes_of_images_stored_any_way_round_are_turned_not_mirrored(flips):
    affine = OBLIQUE @ np.diag([*flips, 1.0])
    centre, size, axes = box_in_mm(REGION, affine)
    assert np.linalg.det(axes) == pytest.approx(1)
    found = {tuple(np.round(corner, 6)) for corner in corners(centre, size, axes)}
    voxels = itertools.product((3.5, 6.5), (1.5, 5.5), (0.5, 2.5))
    ras = [affine @ (*voxel, 1) for voxel in voxels]
    assert found == {tuple(np.round((-x, -y, z), 6)) for x, y, z, _ in ras}


def test_sheared_axes_are_no_box():
    sheared = OBLIQUE.copy()
    sheared[0, 2] = 1.0
    with pytest.raises(ImageError, match=r"a: the axes .* not at right angles"):
        box_in_mm(REGION, sheared)
