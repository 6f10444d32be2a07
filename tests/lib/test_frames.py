# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest

from lib.frames import check_frame_segment, frames
from lib.partial_labels import LabelError
from lib.regions import Region

SHAPE = (6, 5, 4)
INFO = [{"name": "anterior", "idx": 1}, {"name": "Query_Region", "idx": 2}]


def plane(regions, z):
    """One plane of the frames, x downwards."""
    return ["".join(map(str, row)) for row in frames(regions, SHAPE)[:, :, z].tolist()]


def test_frames_of_two_regions_apart_are_two_frames():
    regions = [Region("a", (0, 0, 0), (1, 1, 2)), Region("a", (4, 3, 1), (1, 1, 3))]
    assert plane(regions, 0) == ["01000", "11000", "00000", "00111", "00111", "00111"]
    assert plane(regions, 1) == ["01000", "11000", "00000", "00111", "00101", "00111"]
    assert plane(regions, 2) == ["11000", "11000", "00000", "00111", "00101", "00111"]


def test_regions_side_by_side_share_one_frame():
    regions = [Region("a", (1, 1, 0), (2, 2, 4)), Region("a", (3, 1, 0), (2, 2, 4))]
    assert plane(regions, 2) == ["11110", "10010", "10010", "10010", "10010", "11110"]


def test_the_frame_of_a_patch_stays_out_of_a_slice_beside_it():
    regions = [Region("a", (2, 2, 1), (1, 1, 2)), Region("a", (0, 0, 3), (6, 5, 1))]
    assert plane(regions, 3) == ["11111", "10001", "10001", "10001", "10001", "11111"]
    assert plane(regions, 2) == ["00000", "01110", "01010", "01110", "00000", "00000"]


def test_the_frame_itself_may_come_back_and_so_may_one_of_an_earlier_region():
    region, beside = Region("a", (1, 1, 1), (2, 2, 2)), Region("a", (3, 1, 1), (2, 2, 2))
    check_frame_segment(frames([region], SHAPE) * 2, INFO, [region], [region])
    check_frame_segment(frames([region], SHAPE) * 2, INFO, [beside], [region, beside])
    check_frame_segment(frames([region], SHAPE) * 2, None, [beside], [beside])


def test_painting_into_the_frames_segment_is_refused():
    region = Region("a", (1, 1, 1), (2, 2, 2))
    label = frames([region], SHAPE) * 2
    label[1, 1:3, 1] = 2
    with pytest.raises(LabelError, match=r"2 voxels .* segment query_region, .* submit again"):
        check_frame_segment(label, INFO, [region], [region])
    check_frame_segment(np.minimum(label, 1), INFO, [region], [region])
