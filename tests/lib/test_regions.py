# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.regions import Region, boxes_overlap, centred, clip_size, millimetres_to_voxels

SHAPE = (9, 8, 7)


@st.composite
def regions(draw, shape=SHAPE):
    start = [draw(st.integers(0, n - 1)) for n in shape]
    size = [draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True)]
    return Region("case", tuple(start), tuple(size))


def paint(region, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[region.slices] = True
    return mask


@given(regions(), regions())
def test_overlap_means_a_shared_voxel(a, b):
    assert a.overlaps(b) == bool((paint(a) & paint(b)).any())
    assert boxes_overlap(a.box, b.box) == boxes_overlap(b.box, a.box)


def test_touching_faces_do_not_overlap_and_images_are_apart():
    a, b = Region("case", (0, 0, 0), (4, 4, 4)), Region("case", (4, 0, 0), (4, 4, 4))
    assert not a.overlaps(b)
    assert not a.overlaps(Region("other", (0, 0, 0), (4, 4, 4)))
    assert a.overlaps(Region("case", (3, 3, 3), (1, 1, 1)))


@given(regions())
def test_frame_of_a_patch_lies_outside_and_touches_it(region):
    frame = region.frame(SHAPE)
    spans = [d == n for d, n in zip(region.size, SHAPE, strict=True)]
    if sum(spans) < 2:
        assert not (frame & paint(region)).any()
        grown = np.zeros(SHAPE, bool)
        grown[tuple(slice(max(a - 1, 0), b + 1) for a, b in zip(region.start, region.stop, strict=True))] = True
        assert np.array_equal(frame | paint(region), grown)
    else:
        assert (frame & ~paint(region)).sum() == 0


def test_frame_of_a_slice_is_a_ring_in_the_slice():
    frame = Region("case", (0, 0, 3), (9, 8, 1)).frame(SHAPE)
    ring = np.ones((9, 8), bool)
    ring[1:-1, 1:-1] = False
    assert np.array_equal(frame[:, :, 3], ring)
    assert frame.sum() == ring.sum()


@given(st.tuples(*(st.integers(0, n - 1) for n in SHAPE)), st.tuples(*(st.integers(1, 12) for _ in range(3))))
def test_a_centred_box_lies_inside_and_holds_its_voxel(voxel, size):
    start, kept = centred(voxel, size, SHAPE)
    region = Region("case", start, kept)
    assert region.inside(SHAPE)
    assert kept == clip_size(size, SHAPE)
    assert paint(region)[voxel]


def test_centred_by_hand():
    assert centred((4, 4, 3), (3, 4, 7), SHAPE) == ((3, 2, 0), (3, 4, 7))
    assert centred((0, 7, 6), (4, 4, 4), SHAPE) == ((0, 4, 3), (4, 4, 4))


def test_millimetres_become_voxels_and_never_none():
    assert millimetres_to_voxels((20, 20, 20), (1.0, 0.5, 3.0)) == (20, 40, 7)
    assert millimetres_to_voxels((1, 1, 1), (5.0, 5.0, 5.0)) == (1, 1, 1)


@pytest.mark.parametrize(("start", "size"), [((0, 0, -1), (1, 1, 1)), ((0, 0, 0), (0, 1, 1)), ((0, 0), (1, 1, 1))])
def test_what_is_no_box_is_refused(start, size):
    with pytest.raises(ValueError, match=r"case|three whole numbers"):
        Region("case", start, size)


def test_voxels_of_a_region():
    assert Region("case", (1, 2, 3), (4, 5, 6)).voxels == 120
