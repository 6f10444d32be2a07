# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Tails, intervals, ranks, quantile effects and pseudo-label quality by hand and against goldens."""

import numpy as np
import pytest

from eval.metrics.robustness import (
    efficiency_interval,
    interpolation_quality,
    quantile_effects,
    rank_intervals,
    tail,
)
from lib.pseudo_labels import interpolate


def test_tails_by_hand():
    assert tail([0.0, 1.0, np.nan], 5) == pytest.approx(0.05)
    assert tail(np.arange(101), 95) == 95
    assert np.isnan(tail([np.nan], 5))


def test_efficiency_interval_holds_the_rate_that_made_the_curves():
    rng = np.random.default_rng(0)
    x = np.linspace(0.01, 0.3, 6)
    curves = [0.8 - 0.4 * np.exp(-9 * (x - 0.01)) + rng.normal(0, 0.01, 6) * (x > 0.01) for _ in range(5)]
    found = efficiency_interval([x] * 5, curves, 0.8, np.random.default_rng(1), samples=60)
    assert found.low < found.value < found.high
    assert found.low < 9 < found.high
    same = [0.8 - 0.4 * np.exp(-9 * (x - 0.01))] * 2
    assert efficiency_interval([x] * 2, same, 0.8, rng, samples=5) == pytest.approx((9, 9, 9), rel=1e-4)
    with pytest.raises(ValueError, match="two or more"):
        efficiency_interval([x], curves[:1], 0.8, rng)


def test_rank_intervals_by_hand():
    scores = {"a": [0.9, 0.9, 0.9], "b": [0.8, 0.8, 0.8], "c": [0.1, 0.1, 0.95]}
    table = rank_intervals(scores, np.random.default_rng(0), samples=300).set_index("method")
    assert table["rank"].to_dict() == {"a": 1, "b": 2, "c": 3}
    assert table.loc["a", ["low", "high", "out_low", "out_high"]].tolist() == [1, 2, 1, 1]
    # Only when the last seed is drawn three times is c the best; that is 1 in 27, more than the 2.5 % of the tail.
    assert table.loc["c", ["low", "high"]].tolist() == [1, 3]
    with pytest.raises(ValueError, match="three or more seeds"):
        rank_intervals({"a": [1, 2], "b": [1, 2]}, np.random.default_rng(0))


def test_rank_intervals_average_over_settings():
    scores = {"a": np.array([[3.0, 1.0]] * 3), "b": np.array([[2.0, 2.0]] * 3)}
    table = rank_intervals(scores, np.random.default_rng(0), samples=3)
    assert table["rank"].tolist() == [1.5, 1.5]


def test_quantile_effects_by_hand():
    # Median of each group: 2 without the factor, 12 with it.
    effects = quantile_effects([1, 2, 3, 11, 12, 13, np.nan], {"slice": [0, 0, 0, 1, 1, 1, 1]}, 0.5)
    assert effects == pytest.approx({"intercept": 2, "slice": 10})
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_effects([1, 2], {"slice": [0, 1]}, 5)
    with pytest.raises(ValueError, match="one number a value"):
        quantile_effects([1, 2], {"slice": [0]}, 0.5)


def test_interpolation_quality_by_hand():
    truth = np.zeros((2, 2, 3), dtype=int)
    truth[0, 0], truth[1, 0, 0] = 1, 1
    pseudo = np.zeros_like(truth)
    pseudo[:, 0, 0] = 1
    quality = interpolation_quality(pseudo, truth, {"one": 1, "two": 2})
    assert quality["one"] == pytest.approx((2 / 4 + 1) / 2)
    assert np.isnan(quality["two"])
    assert interpolation_quality(pseudo[::-1], truth[::-1], {"one": 1})["one"] == pytest.approx(quality["one"])
    with pytest.raises(ValueError, match="same slices"):
        interpolation_quality(pseudo[:1], truth, {"one": 1})


def test_pseudo_labels_of_a_cone_are_good():
    grid = np.indices((21, 21)) - 10
    radius = np.hypot(*grid)
    cone = np.stack([(radius <= r).astype(np.uint8) for r in np.linspace(8, 4, 6)])
    pseudo = interpolate(cone[0], cone[-1], 4)
    assert interpolation_quality(pseudo, cone[1:-1], {"one": 1})["one"] > 0.9
