# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.agreement import class_overlaps
from lib.dashboard.stopping_advisor import Batch, Rules, advise, estimate, pooled_dice

LABELS = {"one": 1, "two": 2}


def rng():
    return np.random.default_rng(7)


def regions(dices, size=1000):
    """One class; prediction and answer of `size` voxels each that share `dice` of them."""
    return np.array([[[round(d * size), size, size]] for d in dices])


def batches(levels, noise=0.0, n=20, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Batch(b + 1, n * (b + 1), 10.0 * (b + 1), regions(np.clip(level + noise * draw.standard_normal(n), 0, 1)))
        for b, level in enumerate(levels)
    ]


def test_pooled_dice_sums_voxels_before_it_divides():
    overlaps = np.array([[[8, 10, 10], [0, 0, 0]], [[0, 2, 0], [0, 0, 0]]])
    dice = pooled_dice(overlaps)
    assert dice[0] == pytest.approx(16 / 22)
    assert np.isnan(dice[1])


def test_overlaps_leave_unlabelled_voxels_out():
    proposed = np.array([[[1, 1, 2, 2, 0]]], np.uint8)
    answered = np.array([[[1, 255, 2, 1, 0]]], np.uint8)
    assert class_overlaps(proposed, answered, LABELS).tolist() == [[1, 1, 2], [1, 2, 1]]


def test_an_estimate_is_the_mean_of_classes_that_occur():
    overlaps = np.array([[[5, 10, 10], [0, 0, 0], [3, 4, 4]]] * 6)
    found = estimate(Batch(2, 40, 12.5, overlaps), Rules(), rng())
    assert (found.dice, found.low, found.high) == pytest.approx((0.625, 0.625, 0.625))
    assert (found.classes, found.regions, found.minutes) == ((0.5, None, 0.75), 6, 12.5)
    assert estimate(Batch(2, 40, 12.5, np.zeros((6, 2, 3), int)), Rules(), rng()) is None


def test_one_batch_is_too_early():
    found = advise(batches([0.6]), 40, 20, Rules(), rng())
    assert (found.verdict, found.gain) == ("too early to say", None)
    assert found.sentence.startswith("1 of the 3 batches needed")


def test_small_batches_and_batches_of_one_model_do_not_count():
    assert advise(batches([0.5, 0.6, 0.7], n=4), 16, 4, Rules(), rng()).gain is None
    same = [Batch(b.round, 20, b.minutes, b.overlaps_ncv) for b in batches([0.5, 0.6, 0.7])]
    assert advise(same, 80, 20, Rules(), rng()).gain is None


def test_a_flat_curve_may_stop():
    found = advise(batches([0.8, 0.8, 0.8, 0.8]), 100, 20, Rules(), rng())
    assert found.verdict == "you may stop"
    assert (found.gain, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-6)
    assert "+0.000" in found.sentence


def test_a_rising_curve_continues_by_the_fitted_logarithm():
    levels = [0.1 + 0.1 * np.log(20 * k) for k in (1, 2, 3, 4)]
    found = advise(batches(levels), 100, 20, Rules(), rng())
    assert found.verdict == "continue"
    assert found.gain == pytest.approx(0.1 * np.log(120 / 100), abs=2e-3)


def test_a_curve_that_levels_off_is_taken_for_one():
    levels = [0.9 - 8.0 / (20 * k) for k in (1, 2, 3, 4, 5)]
    found = advise(batches(levels), 120, 20, Rules(), rng())
    assert found.gain == pytest.approx(8.0 / 120 - 8.0 / 140, abs=2e-3)


def test_quality_never_exceeds_one():
    levels = [0.1 + 0.2 * np.log(k + 1) ** 2 for k in range(4)]
    found = advise(batches(levels), 100, 10**9, Rules(), rng())
    assert found.gain <= 1


def test_doubt_about_a_small_gain_is_told():
    found = advise(batches([0.70, 0.72, 0.71, 0.70], noise=0.1), 100, 20, Rules(gain=0.01), rng())
    assert (found.verdict, found.gain < 0.01 < found.high) == ("too early to say", True)
    assert "still reaches above" in found.sentence


def test_what_is_worth_a_batch_is_a_rule():
    rising = batches([0.1 + 0.1 * np.log(20 * k) for k in (1, 2, 3, 4)])
    assert advise(rising, 100, 20, Rules(gain=0.05), rng()).verdict == "you may stop"
    assert advise(rising, 100, 20, Rules(batches=5), rng()).verdict == "too early to say"


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_widens_with_noise(seed):
    levels = [0.6, 0.65, 0.68, 0.7, 0.71]
    quiet, loud = (advise(batches(levels, noise, seed=seed), 120, 20, Rules(), rng()) for noise in (0.02, 0.15))
    assert loud.high - loud.low > 1.5 * (quiet.high - quiet.low)


def test_batches_that_scatter_beyond_their_regions_widen_it_too():
    smooth = advise(batches([0.6, 0.62, 0.64, 0.66, 0.68]), 120, 20, Rules(), rng())
    rough = advise(batches([0.6, 0.68, 0.58, 0.70, 0.64]), 120, 20, Rules(), rng())
    assert rough.high - rough.low > 2 * (smooth.high - smooth.low)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=5, max_size=8), min_size=3, max_size=6),
    st.integers(1, 200),
    st.floats(0.001, 0.1),
)
def test_verdicts_follow_from_the_interval(shared, more, worth):
    made = [
        Batch(b, 10 * (b + 1), float(b), np.array([[[s, 100, 100]] for s in rows])) for b, rows in enumerate(shared)
    ]
    found = advise(made, 10 * (len(made) + 1), more, Rules(gain=worth), rng())
    again = advise(made, 10 * (len(made) + 1), more, Rules(gain=worth), rng())
    assert found == again
    assert found.low <= found.gain <= found.high
    expected = "you may stop" if found.high < worth else "continue" if found.gain >= worth else "too early to say"
    assert found.verdict == expected
