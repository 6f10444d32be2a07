# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentation measures against hand-computed cases, published goldens and MONAI."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from eval.metrics.segmentation import (
    dice,
    dice_per_slice,
    hausdorff,
    hausdorff95,
    mean_surface_distance,
    relative_volume_error,
    sensitivity,
    specificity,
    surface_dice,
)
from eval.metrics.surfaces import Surfaces, _by_transform, _by_tree, _edge

DISTANCES = [hausdorff, hausdorff95, mean_surface_distance]


def _blob(rng, shape, spread=6.0):
    centre = rng.uniform(0.3, 0.7, 3) * shape
    radii = rng.uniform(3, spread, 3)
    grid = np.stack(np.indices(shape), axis=-1)
    return (((grid - centre) / radii) ** 2).sum(-1) + rng.normal(0, 0.15, shape) < 1


def test_counts_by_hand():
    prediction = np.array([[[1, 1, 0, 0, 0]]], dtype=bool)
    truth = np.array([[[0, 1, 1, 1, 0]]], dtype=bool)
    assert dice(prediction, truth) == pytest.approx(2 / 5)
    assert sensitivity(prediction, truth) == pytest.approx(1 / 3)
    assert specificity(prediction, truth) == pytest.approx(1 / 2)
    assert relative_volume_error(prediction, truth) == pytest.approx(100 / 3)


def test_distances_by_hand_in_millimetres():
    prediction = np.zeros((1, 1, 10), dtype=bool)
    truth = prediction.copy()
    prediction[..., 2], truth[..., 5] = True, True
    spacing = (1.0, 1.0, 2.5)
    for measure in DISTANCES:
        assert measure(prediction, truth, spacing=spacing) == pytest.approx(7.5)
    truth[..., 3] = True  # directed: prediction {2.5}; truth {2.5, 7.5}
    assert hausdorff(prediction, truth, spacing=spacing) == pytest.approx(7.5)
    assert hausdorff95(prediction, truth, spacing=spacing) == pytest.approx(7.25)
    assert mean_surface_distance(prediction, truth, spacing=spacing) == pytest.approx(12.5 / 3)
    assert Surfaces.between(prediction, truth, spacing=spacing).mean(directed=True) == pytest.approx(3.75)
    assert surface_dice(prediction, truth, tolerance=2.5, spacing=spacing) == pytest.approx(2 / 3)


def test_inner_voxels_are_no_surface():
    cube = np.zeros((7, 7, 7), dtype=bool)
    cube[1:6, 1:6, 1:6] = True
    hollow = cube.copy()
    hollow[3, 3, 3] = False  # the six neighbours of the hole become surface, at distance 1 from the outer faces
    surfaces = Surfaces.between(cube, hollow, spacing=(1, 1, 1))
    assert surfaces.to_truth.size == 5**3 - 3**3
    assert surfaces.to_prediction.size == 5**3 - 3**3 + 6
    assert surfaces.hausdorff() == 1.0


def test_image_border_counts_as_outside():
    full = np.ones((3, 3, 3), dtype=bool)
    assert np.count_nonzero(_edge(full)) == 26


@pytest.mark.parametrize("measure", [dice, relative_volume_error, *DISTANCES])
def test_absent_in_both_is_not_counted(measure):
    nothing = np.zeros((4, 5, 6), dtype=bool)
    assert np.isnan(measure(nothing, nothing))


@pytest.mark.parametrize("measure", DISTANCES)
def test_one_empty_costs_the_diagonal(measure):
    nothing = np.zeros((3, 4, 6), dtype=bool)
    something = nothing.copy()
    something[1, 1, 1] = True
    for pair in [(nothing, something), (something, nothing)]:
        assert measure(*pair, spacing=(1, 1, 2)) == pytest.approx(13.0)  # sqrt(3^2 + 4^2 + 12^2)
        assert dice(*pair) == 0.0
        assert surface_dice(*pair, tolerance=100) == 0.0
    assert relative_volume_error(nothing, something) == 100.0
    assert np.isnan(relative_volume_error(something, nothing))
    assert np.isnan(sensitivity(something, nothing))
    assert specificity(something, nothing) == pytest.approx(71 / 72)


def test_two_dimensional_dice_leaves_empty_slices_out():
    prediction = np.zeros((2, 1, 3), dtype=bool)
    truth = prediction.copy()
    prediction[:, 0, 0], truth[0, 0, 0], truth[0, 0, 1] = True, True, True
    assert dice_per_slice(prediction, truth) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("measure", [dice, sensitivity, hausdorff95])
def test_shapes_that_differ_are_refused(measure):
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) but truth \(2, 2, 3\)"):
        measure(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool))


def test_spacing_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        hausdorff95(np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool), spacing=(1, 0, 1))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 3.0)])
def test_distances_agree_with_monai(spacing):
    rng = np.random.default_rng(5)
    for _ in range(12):
        prediction, truth = _blob(rng, (26, 30, 20)), _blob(rng, (26, 30, 20))
        pair = [torch.as_tensor(m)[None, None].float() for m in (prediction, truth)]
        options = {"include_background": True, "spacing": spacing}
        expected_hd = float(compute_hausdorff_distance(*pair, percentile=95, **options))
        expected_msd = float(compute_average_surface_distance(*pair, symmetric=True, **options))
        expected_max = float(compute_hausdorff_distance(*pair, **options))
        expected_sd = float(compute_surface_dice(*pair, class_thresholds=[1.5], **options))
        assert hausdorff95(prediction, truth, spacing=spacing) == pytest.approx(expected_hd, rel=1e-6, abs=1e-6)
        assert mean_surface_distance(prediction, truth, spacing=spacing) == pytest.approx(
            expected_msd, rel=1e-6, abs=1e-6
        )
        assert hausdorff(prediction, truth, spacing=spacing) == pytest.approx(expected_max, rel=1e-6, abs=1e-6)
        assert surface_dice(prediction, truth, tolerance=1.5, spacing=spacing) == pytest.approx(expected_sd, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.6))
def test_tree_and_transform_give_the_same_distances(seed, density):
    rng = np.random.default_rng(seed)
    a, b = (rng.random((7, 8, 6)) < density for _ in range(2))
    if a.any() and b.any():
        steps = np.array([0.8, 1.0, 2.0])
        np.testing.assert_allclose(np.sort(_by_tree(a, b, steps)), np.sort(_by_transform(a, b, steps)), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_measures_are_symmetric_and_ordered(seed):
    rng = np.random.default_rng(seed)
    a, b = _blob(rng, (14, 14, 14)), _blob(rng, (14, 14, 14))
    if a.any() and b.any():
        assert dice(a, b) == dice(b, a)
        assert hausdorff95(a, b) == hausdorff95(b, a)
        assert mean_surface_distance(a, b) == pytest.approx(mean_surface_distance(b, a))
        assert mean_surface_distance(a, b) <= hausdorff95(a, b) + 1e-9 or dice(a, b) > 0.9
        assert hausdorff95(a, b) <= hausdorff(a, b)
        assert hausdorff95(a, a) == 0.0
        assert dice(a, a) == 1.0


def test_dice_matches_nnactive(reference):
    golden = np.load(reference / "nnactive/dice.npz")
    expected = golden["dice"]
    ours = np.array(
        [[dice(golden[f"pred{i}"] == c, golden[f"ref{i}"] == c) for c in (1, 2, 3)] for i in range(len(expected))]
    )
    np.testing.assert_allclose(ours, expected, atol=1e-12, equal_nan=True)
    np.testing.assert_allclose(np.nanmean(ours, axis=0), golden["class_mean"], atol=1e-12)
    assert np.nanmean(ours, axis=0).mean() == pytest.approx(float(golden["foreground_mean"]))


def test_measures_match_the_burmeister_reference(reference):
    arrays = np.load(reference / "active_segmentation/metrics.npz")
    for number in sorted({name.partition("_")[0] for name in arrays}):
        case = {name.partition("_")[2]: arrays[name] for name in arrays if name.startswith(f"{number}_")}
        prediction, target = case["prediction"], case["target"]
        for c in range(3):
            p, t = prediction == c, target == c
            for measure, key in [(dice, "dice"), (sensitivity, "sensitivity"), (specificity, "specificity")]:
                assert measure(p, t) == pytest.approx(case[f"{key}_eps0"][c], abs=1e-5, nan_ok=True)
            surfaces = Surfaces.between(p, t, spacing=[1] * p.ndim, full=True)
            if surfaces.undefined is None:
                directed = case["hd95_max_of_directed_percentiles"][c]
                assert surfaces.hausdorff(95) == pytest.approx(directed, abs=1e-5)
                assert surfaces.hausdorff(95, pooled=True) == pytest.approx(case["hd_0.95"][c], abs=1e-5)


def test_a_negative_tolerance_is_refused():
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="tolerance -1 mm is negative"):
        Surfaces.between(mask, mask, spacing=(1, 1, 1)).dice(-1)
