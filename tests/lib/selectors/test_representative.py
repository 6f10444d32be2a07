# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Strata and distances by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lib.selectors.representative import farthest_on_average, stratified


def test_labels_may_be_numbers() -> None:
    strata, labelled = ["a", "a", "b", "b", "b"], [1, 0, 0, 1, 0]
    found, expected = (
        stratified(strata, flags, 9, np.random.default_rng(0)) for flags in (labelled, np.array(labelled, bool))
    )
    np.testing.assert_array_equal(found, expected)
    assert sorted(found.tolist()) == [1, 2, 4]


@pytest.mark.parametrize("equal", ["fraction", "count"])
def test_outliers_come_last_in_the_smallest_pool_too(equal: str) -> None:
    for seed in range(20):
        assert stratified([-1, 0], [False, False], 2, np.random.default_rng(seed), equal).tolist() == [1, 0]


def test_among_tied_strata_every_unit_has_the_same_chance() -> None:
    strata = ["a"] + ["b"] * 9
    first = [int(stratified(strata, [False] * 10, 1, np.random.default_rng(seed))[0]) for seed in range(1000)]
    # 100 expected, five standard deviations of 9.5; with the same chance for each stratum, 500
    assert 52 < first.count(0) < 148


def test_every_pick_counts() -> None:
    strata, labelled = ["a"] * 4 + ["b"] * 4, [False] * 4 + [True, True, False, False]
    for seed in range(10):
        picks = [strata[i] for i in stratified(strata, labelled, 4, np.random.default_rng(seed), "count")]
        assert picks[:2] == ["a", "a"]
        assert sorted(picks) == ["a", "a", "a", "b"]


@pytest.mark.parametrize("labelled", [None, np.zeros((0, 1))])
def test_the_farthest_without_labels(labelled) -> None:
    points = [[0.0], [0.1], [0.3]]
    assert farthest_on_average(points, labelled, 2).tolist() == [0, 2]
    assert farthest_on_average(points, labelled, 9).tolist() == [0, 2, 1]


def test_the_farthest_from_labels() -> None:
    assert farthest_on_average([[0.0], [1], [5]], [[4.0], [6]], 2).tolist() == [0, 1]  # sums 10, 8, 2, then 9 and 7


def test_features_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"^unlabelled "):
        farthest_on_average([[np.nan]], [[1.0]], 1)
    with pytest.raises(ValueError, match=r"^labelled "):
        farthest_on_average([[1.0]], [[np.nan]], 1)
