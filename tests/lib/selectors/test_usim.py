# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""USIM's parts by hand: knees, weights, similarities, and draws."""

from __future__ import annotations

import numpy as np
import pytest

from lib.selectors.usim import (
    _draw_parameters,
    class_weights,
    elbow,
    fisher_diagonal,
    fisher_similarity,
    kneedle,
    query_set_size,
    usim,
)


def test_single_precision_is_worked_on_in_double() -> None:
    rng = np.random.default_rng(0)
    f, g, q = (rng.uniform(0.1, 1, shape).astype(np.float32) for shape in ((5,), (3, 5), (2, 5)))
    for mine, expected in (
        (class_weights(f), class_weights(f.astype(np.float64))),
        (fisher_diagonal(g), fisher_diagonal(g.astype(np.float64))),
        (fisher_similarity(g, q, f, 0.1), fisher_similarity(*(a.astype(np.float64) for a in (g, q, f)), 0.1)),
    ):
        assert mine.dtype == np.float64
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("knee", [elbow, kneedle])
def test_a_curve_without_extent_has_no_knee(knee) -> None:
    with np.errstate(all="raise"):
        for curve in ([], [5.0], [2.0, 2.0, 2.0]):
            assert knee(curve) is None


def test_the_height_of_a_curve_does_not_matter() -> None:
    # (1 - y) - x of both: 0, 1/3, 1/6, 0
    for curve in ([3, 1, 0.5, 0], [13, 11, 10.5, 10]):
        assert elbow(curve) == 1
        assert kneedle(curve, 0.6) == 1


def test_how_far_the_difference_has_to_fall_after_a_knee() -> None:
    curve = [1, 17 / 30, 1 / 30, 0]  # differences 0, 0.1, 0.3, 0: the knee is the last but one
    assert kneedle(curve, 0.3) == 2
    assert kneedle(curve, 0.8) == 2  # 0.3 - 0.8 / 3 is still above 0
    assert kneedle(curve, 0.95) is None  # 0.3 - 0.95 / 3 is not
    assert kneedle([1, 0.75, 0.25, 0.25, 0], 1) is None  # falls to the threshold, 0, not below it


def test_of_a_plateau_the_last_is_the_knee() -> None:
    assert kneedle([1, 0.5, 0.25, 0.25, 0], 0.5) == 2  # differences 0, 1/4, 1/4, 0, 0


def test_behind_a_minimum_a_difference_below_zero_confirms_the_knee() -> None:
    differences = np.array([0, 0.3, -0.2, -0.1, 0])
    assert kneedle(1 - np.linspace(0, 1, 5) - differences, 10) == 1


def test_the_query_set_reaches_to_the_elbow() -> None:
    u = np.linspace(1, 0, 42) ** 1.3
    # s - s^1.3 is largest at s = 1.3^(-1 / 0.3) = 0.417, rank 23.9, where it is 0.096: less than Kneedle's 10 / 41
    shuffled = np.random.default_rng(0).permutation(u)
    assert elbow(u) == 24
    assert query_set_size(shuffled, 1) == 24
    assert query_set_size(shuffled, 5) == 25
    assert kneedle(u) is None
    assert query_set_size(shuffled, 1, published=True) == 5


def test_fisher_similarity_by_hand() -> None:
    candidates, queries, fisher = [[1, 2], [3, 4]], [[1, 1]], [1, 3]
    np.testing.assert_allclose(fisher_similarity(candidates, queries, fisher), [[5 / 6], [13 / 6]])
    np.testing.assert_allclose(fisher_similarity(candidates, queries, fisher, 1), [[0.5], [1.25]])


def test_parameters_without_information_are_never_drawn() -> None:
    fisher = np.array([1, 0, 1e-21, 0, 1.0])
    for seed in range(20):
        drawn = _draw_parameters(fisher, 2, np.random.default_rng(seed))
        assert sorted(drawn.tolist()) == [0, 4]
    assert _draw_parameters(np.zeros(3), 2, np.random.default_rng(0)).tolist() == [0, 1]


@pytest.mark.parametrize("shapes", [((3,), (3, 2)), ((3, 2), (3,)), ((2, 2), (3, 2))])
def test_arrays_that_disagree(shapes) -> None:
    variances, gradients = map(np.ones, shapes)
    with pytest.raises(ValueError, match=r"USIM needs variances \(U, C\) and gradients \(U, P\), found"):
        usim(variances, gradients, [1, 1], 1, np.random.default_rng(0))


def test_without_any_uncertainty_every_candidate_may_be_drawn() -> None:
    drawn: set[int] = set()
    for seed in range(10):
        choice = usim(np.zeros((6, 2)), np.eye(6), [1, 1], 1, np.random.default_rng(seed))
        drawn |= set(choice.query_set.tolist())
    assert drawn == set(range(6))


def test_only_what_is_uncertain_about_a_class_that_counts_is_drawn() -> None:
    variances = np.array([[0.0, 0.01], [0.0, 0.0], [0.02, 0.0]])
    rng = np.random.default_rng(0)
    assert set(usim(variances, np.eye(3), [1, 1], 1, rng).query_set.tolist()) == {0}
    assert set(usim(variances, np.eye(3), [1, 1], 1, rng, background=1).query_set.tolist()) == {2}


def test_equal_candidates_keep_their_order() -> None:
    gradients = np.random.default_rng(1).normal(size=(64, 8))
    choice = usim(np.ones((64, 2)), gradients, [1, 1], 2, np.random.default_rng(0))
    expected = np.random.default_rng(0).choice(64, 10, replace=True, p=np.full(64, 1 / 64))
    np.testing.assert_array_equal(choice.query_set, expected)


@pytest.mark.parametrize(("units", "optimizer"), [(999, "lazy"), (1000, "stochastic")])
def test_large_pools_are_searched_by_samples(units: int, optimizer: str) -> None:
    rng = np.random.default_rng(2)
    variances, gradients = rng.random((units, 2)), rng.normal(size=(units, 6))
    mine, other = (
        usim(variances, gradients, [1, 1], 40, np.random.default_rng(3), optimizer=way) for way in (None, optimizer)
    )
    np.testing.assert_array_equal(mine.indices, other.indices)
    ways = {
        tuple(usim(variances, gradients, [1, 1], 40, np.random.default_rng(3), optimizer=way).indices.tolist())
        for way in ("lazy", "stochastic")
    }
    assert len(ways) == 2


def test_cosines_look_at_the_first_ten_thousand_parameters() -> None:
    gradients = np.zeros((2, 10_001))
    gradients[0, 0] = gradients[1, 0] = gradients[1, -1] = 1
    found = [
        usim(np.ones((2, 2)), gradients, [1, 1], 2, np.random.default_rng(0), **keys).gains.tolist()
        for keys in ({}, {"parameters": 10_000}, {"parameters": 10_001})
    ]
    assert found[0] == found[1] != found[2]


def test_fisher_similarity_does_not_depend_on_the_scale_of_gradients() -> None:
    alone = usim(np.ones((1, 2)), [[0.001]], [1, 1], 1, np.random.default_rng(0), kind="f")
    # S = g g / F = 1, and the batch covers one query and is covered by it.
    assert alone.gains.tolist() == pytest.approx([2], rel=1e-6)
    rng = np.random.default_rng(4)
    variances, gradients = rng.random((20, 2)), rng.normal(size=(20, 5))
    small, large = (
        usim(variances, scale * gradients, [1, 1], 4, np.random.default_rng(0), kind="f") for scale in (1e-4, 1e4)
    )
    np.testing.assert_array_equal(small.indices, large.indices)
    np.testing.assert_allclose(small.gains, large.gains, rtol=1e-6)
