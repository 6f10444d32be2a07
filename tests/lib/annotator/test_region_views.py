# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.annotator.region_views import MARGIN, view_of

TURNS = [[1, 2, 3], [-1, 2, 3], [2, -1, 3], [-3, 1, -2], [3, 2, -1], [-1, -2, -3]]


def affine_of(turn: list[int], spacing: tuple[float, float, float] = (0.7, 0.8, 3.0), tilt: float = 0.0) -> np.ndarray:
    """Stored axis i runs along world axis |turn[i]| - 1, backwards if negative; tilted about the first one."""
    matrix = np.zeros((3, 3))
    for stored, world in enumerate(turn):
        matrix[abs(world) - 1, stored] = np.sign(world) * spacing[stored]
    cos, sin = np.cos(tilt), np.sin(tilt)
    made = np.eye(4)
    made[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ matrix
    made[:3, 3] = 11, -7, 3
    return made


def cut(view, image: np.ndarray) -> np.ndarray:
    start, size = view.crop
    return view.upright(image[tuple(slice(a, a + d) for a, d in zip(start, size, strict=True))])


@settings(deadline=None)
@given(
    st.sampled_from(TURNS),
    st.floats(-0.6, 0.6),
    st.tuples(*[st.integers(1, 60)] * 3),
    st.data(),
)
def test_a_view_shows_the_very_voxels_and_leads_back(turn, tilt, shape, data):
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - a)) for a, n in zip(start, shape, strict=True))
    affine = affine_of(turn, tilt=tilt)
    view = view_of((start, size), shape, affine)
    image = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    shown = cut(view, image)
    assert shown.shape == view.shape
    a, d = view.region
    inside = shown[tuple(slice(s, s + n) for s, n in zip(a, d, strict=True))]
    np.testing.assert_array_equal(
        view.stored(inside), image[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]
    )
    np.testing.assert_array_equal(view.upright(view.stored(inside)), inside)
    # Every voxel of the view lies at the place of the stored voxel whose value it has.
    for voxel in (np.zeros(3), np.array(shown.shape) - 1):
        stored = np.unravel_index(shown[tuple(voxel.astype(int))], shape)
        there = view.upright_affine @ [*voxel, 1]
        np.testing.assert_allclose(there, affine @ [*stored, 1], atol=1e-6)
    assert nib.aff2axcodes(view.upright_affine) == ("R", "A", "S")


def test_the_margin_is_half_of_the_region_and_sixteen_voxels_at_least():
    view = view_of(((100, 100, 100), (10, 40, 20)), (300, 300, 110), np.eye(4))
    assert view.crop == ((84, 80, 84), (42, 80, 26))
    assert view.region == ((16, 20, 16), (10, 40, 20))


def test_the_margin_gives_way_to_a_limit_and_the_region_does_not():
    view = view_of(((100, 100, 100), (40, 40, 40)), (300, 300, 300), np.eye(4), most=70_000)
    assert np.prod(view.crop[1]) <= 70_000
    assert all(m >= 40 for m in view.crop[1])
    assert view_of(((0, 0, 0), (9, 9, 9)), (9, 9, 9), np.eye(4), most=10).crop == ((0, 0, 0), (9, 9, 9))
    assert MARGIN == 16


@pytest.mark.parametrize("turn", TURNS)
def test_the_file_of_a_view_has_its_voxels_and_place(turn):
    view = view_of(((3, 4, 5), (4, 5, 3)), (12, 13, 14), affine_of(turn))
    shown = cut(view, np.random.default_rng(0).normal(size=(12, 13, 14)).astype(np.float32))
    read = nib.Nifti1Image.from_stream(io.BytesIO(view.nifti(shown)))
    np.testing.assert_array_equal(np.asarray(read.dataobj), shown)
    np.testing.assert_allclose(read.affine, view.upright_affine, atol=1e-5)
