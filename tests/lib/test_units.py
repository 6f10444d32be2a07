# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.units import box_mean, covering_means, covering_starts, slice_mean, unit_grid, unit_size, volume_mean


def plain_box_mean(score: np.ndarray, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    kept = tuple(min(k, n) for k, n in zip(size, score.shape, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(score.astype(np.float64), kept)
    return windows.mean(axis=(3, 4, 5))[tuple(slice(None, None, s) for s in stride)]


@pytest.mark.parametrize("case", ["s1", "s1_big", "s2", "s122", "s8", "s3_big"])
def test_published_aggregation(reference: Path, case: str) -> None:
    golden = np.load(reference / "nnactive/aggregation.npz")
    size, stride = golden[f"{case}_patch_size"], golden[f"{case}_stride"]
    grid = box_mean(golden["u"], size, stride)
    np.testing.assert_allclose(grid, golden[f"{case}_agg"], atol=1e-6)
    assert unit_size("patch", golden["u"].shape, size) == tuple(golden[f"{case}_kernel"])
    positions = np.stack(np.unravel_index(np.arange(grid.size), grid.shape), axis=1)
    np.testing.assert_array_equal(positions * stride, golden[f"{case}_coords"])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 10)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(0, 2**32),
)
def test_box_mean_is_the_mean_of_every_inner_box(
    shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], seed: int
) -> None:
    score = np.random.default_rng(seed).random(shape, dtype=np.float32)
    before = score.copy()
    grid = box_mean(score, size, stride)
    np.testing.assert_allclose(grid, plain_box_mean(score, size, stride), atol=1e-6)
    np.testing.assert_array_equal(score, before)
    assert grid.min() >= 0


def test_saturated_maps_stay_zero_and_not_negative() -> None:
    score = np.zeros((40, 40, 40), np.float32)
    score[:8, :8, :8] = 1e-12
    grid = box_mean(score, (16, 16, 16))
    assert grid.min() == 0
    assert grid[20:].max() == 0


def test_box_mean_takes_views_and_other_types() -> None:
    score = np.arange(60).reshape(3, 4, 5)
    np.testing.assert_allclose(box_mean(score.T, (2, 2, 2)), plain_box_mean(score.T, (2, 2, 2), (1, 1, 1)), rtol=1e-6)


def test_slices_and_volumes_by_hand(reference: Path) -> None:
    golden = np.load(reference / "formulas/slices.npz")
    np.testing.assert_allclose(slice_mean(golden["U"], 0), golden["slice_score_axis0"], rtol=1e-12)
    score = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(slice_mean(score, 2), [10, 11, 12, 13])
    assert volume_mean(score) == 11.5
    mask = score > 21
    assert volume_mean(score, mask) == 22.5
    assert volume_mean(score, np.zeros_like(mask)) == 11.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_and_volumes_are_boxes(axis: int) -> None:
    score = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    size = unit_size("slice", score.shape, axis=axis)
    grid = unit_grid(score, size)
    assert grid.shape == tuple(score.shape[a] if a == axis else 1 for a in range(3))
    np.testing.assert_allclose(grid, box_mean(score, size), atol=1e-6)
    np.testing.assert_allclose(unit_grid(score, unit_size("volume", score.shape)).item(), score.mean(), rtol=1e-6)


def test_unit_sizes_and_refusals() -> None:
    assert unit_size("patch", (10, 4, 8), (5, 5, 5)) == (5, 4, 5)
    assert unit_size("slice", (10, 4, 8), axis=0) == (1, 4, 8)
    assert unit_size("volume", (10, 4, 8)) == (10, 4, 8)
    with pytest.raises(ValueError, match="needs a size"):
        unit_size("patch", (10, 4, 8))
    with pytest.raises(ValueError, match="must be one of patch, slice, volume"):
        unit_size("cube", (10, 4, 8))
    with pytest.raises(ValueError, match="axis 0, 1 or 2"):
        unit_size("slice", (10, 4, 8), axis=3)
    with pytest.raises(ValueError, match="axis 0, 1 or 2"):
        slice_mean(np.zeros((2, 2, 2)), 3)
    with pytest.raises(ValueError, match="three axes"):
        box_mean(np.zeros((2, 2)), (1, 1, 1))
    with pytest.raises(ValueError, match="one voxel or more"):
        box_mean(np.zeros((2, 2, 2)), (0, 1, 1))


def test_covering_starts_by_hand() -> None:
    assert covering_starts(40, 20) == (0, 20)
    assert covering_starts(35, 20) == (0, 15)
    assert covering_starts(50, 20) == (0, 15, 30)
    assert covering_starts(10, 4) == (0, 3, 6)
    assert covering_starts(7, 7) == (0,)


@given(st.integers(1, 700), st.integers(1, 700))
def test_covering_starts_cover_evenly_with_as_few_as_can_be(length: int, size: int) -> None:
    size = min(size, length)
    starts = covering_starts(length, size)
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert len(starts) == -(-length // size)
    gaps = np.diff(starts)
    assert (gaps <= size).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 2**32 - 1))
def test_covering_means_are_means_of_their_boxes(shape: tuple[int, ...], size: tuple[int, ...], seed: int) -> None:
    score = np.random.default_rng(seed).random(shape, dtype=np.float32)
    size = tuple(min(k, n) for k, n in zip(size, shape, strict=True))
    means = covering_means(score, size)
    starts = [covering_starts(n, k) for n, k in zip(shape, size, strict=True)]
    assert means.shape == tuple(map(len, starts))
    for cell in np.ndindex(means.shape):
        box = tuple(slice(s[c], s[c] + k) for s, c, k in zip(starts, cell, size, strict=True))
        np.testing.assert_allclose(means[cell], score[box].mean(dtype=np.float64), rtol=1e-6)
