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

from lib.partial_labels import UNLABELLED
from lib.training.sampling import AnnotatedCase, RegionSampler, bounds, place_centred, place_uniform

sizes = st.tuples(*(st.integers(1, 12) for _ in range(3)))


@given(sizes, sizes, st.data())
def test_a_placed_crop_holds_its_voxel_and_stays_inside(patch, shape, data):
    voxel = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for start in (place_uniform(voxel, patch, shape, rng), place_centred(voxel, patch, shape)):
        for v, s, p, n in zip(voxel, start, patch, shape, strict=True):
            assert s <= v < s + p
            assert (s >= 0 and s + p <= n) if p <= n else (s <= 0 and s + p >= n)


def test_the_voxel_is_uniform_inside_the_crop_and_never_just_outside():
    rng = np.random.default_rng(0)
    places = [30 - place_uniform((30, 30, 30), (4, 5, 6), (60, 60, 60), rng)[0] for _ in range(4000)]
    counts = np.bincount(places, minlength=4)
    assert sorted(set(places)) == [0, 1, 2, 3]
    assert np.abs(counts - 1000).max() < 150


@pytest.fixture(scope="module")
def golden(reference):
    return np.load(reference / "nnactive/region_sampling.npz")


@pytest.mark.parametrize("name", ["interior", "corner", "small"])
def test_centred_crops_are_nnunets(golden, name):
    voxel, patch, shape = (golden[f"{name}_{key}"].tolist() for key in ("voxel", "patch", "shape"))
    ours = place_centred(voxel, patch, shape)
    # The published crop may leave the image at its far border; ours is pushed back inside. An axis shorter than the
    # crop is centred by us, shifted within its padding by nnU-Net.
    for axis in range(3):
        if patch[axis] <= shape[axis]:
            assert ours[axis] == min(golden[f"{name}_fg_lb"][axis], shape[axis] - patch[axis])


def test_uniform_starts_cover_the_published_range_less_its_off_by_one(golden):
    voxel, patch, shape = (golden[f"interior_{key}"].tolist() for key in ("voxel", "patch", "shape"))
    rng = np.random.default_rng(1)
    starts = np.array([place_uniform(voxel, patch, shape, rng) for _ in range(3000)])
    # v - U{0..p-1}: the published highest start is voxel - 1 (the sampled position 1), the lowest voxel - p.
    assert starts.max(axis=0).tolist() == voxel
    assert starts.min(axis=0).tolist() == [v - p + 1 for v, p in zip(voxel, patch, strict=True)]
    assert golden["interior_lb_min"].tolist() == [v - p for v, p in zip(voxel, patch, strict=True)]


def test_bounds_by_hand():
    assert bounds((4, 4, 4), (10, 4, 3)) == ((0, 0, 0), (6, 0, 0))
    assert bounds((6, 5, 8), (3, 3, 3)) == ((-1, -1, -2), (-1, -1, -2))


def label(seed, annotate=True):
    mask = np.full((12, 10, 8), UNLABELLED, np.uint8)
    if annotate:
        mask[2:6, 3:7, 1:5] = 0
        mask[4, 4, 2 + seed] = 1
        mask[3, 5, 2] = 2
    return mask


def test_every_crop_holds_an_annotated_voxel_and_a_third_is_centred_on_foreground():
    rng = np.random.default_rng(3)
    masks = [label(0), label(1), label(0, annotate=False)]
    sampler = RegionSampler([AnnotatedCase.from_label(mask, rng) for mask in masks], (3, 3, 3))
    centred_on = []
    cases = []
    for _ in range(600):
        for index, start in sampler.draw(2, rng):
            cut = masks[index][tuple(slice(s, s + 3) for s in start)]
            assert (cut != UNLABELLED).any()
            centred_on.append(int(masks[index][tuple(s + 1 for s in start)]))
            cases.append(index)
    assert set(cases) == {0, 1}
    assert abs(cases.count(0) - 600) < 100
    # 400 crops are centred on class 1 or 2 by draw; the others hit one of two voxels among 64 only by chance.
    share = sum(c in (1, 2) for c in centred_on) / len(centred_on)
    assert 1 / 3 < share < 1 / 3 + 0.06
    assert abs(centred_on.count(1) - centred_on.count(2)) < 80


def test_a_class_of_few_cases_gets_as_many_crops_as_any_other():
    rng = np.random.default_rng(3)
    rare, common = np.zeros((12, 10, 8), np.uint8), np.zeros((12, 10, 8), np.uint8)
    rare[4, 4, 4], rare[8, 8, 6], common[8, 8, 6] = 2, 1, 1
    masks = [rare] + [common] * 9
    sampler = RegionSampler([AnnotatedCase.from_label(mask, rng) for mask in masks], (3, 3, 3), foreground=1.0)
    drawn = [pair for _ in range(300) for pair in sampler.draw(2, rng)]
    centred = [int(masks[index][tuple(s + 1 for s in start)]) for index, start in drawn]
    assert abs(centred.count(2) - 300) < 50
    assert centred.count(1) + centred.count(2) == 600


def test_without_annotation_there_is_nothing_to_draw():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="annotate a region"):
        RegionSampler([AnnotatedCase.from_label(label(0, annotate=False), rng)], (3, 3, 3))
