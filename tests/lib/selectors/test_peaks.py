# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Peaks over slices by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lib.selectors.peaks import ranked_slices, slice_peaks


def test_peaks_are_five_slices_apart_unless_told_otherwise() -> None:
    scores = [0, 3, 0, 0, 0, 0, 2, 0]
    assert slice_peaks(scores).tolist() == [1, 6]
    assert slice_peaks(scores, 6).tolist() == [1]
    assert ranked_slices(scores, np.zeros(8, bool))[1].tolist()[:2] == [0, 0]
    assert slice_peaks([0, 3, 0, 0, 0, 2, 0]).tolist() == [1]


def test_equal_peaks_are_listed_by_index() -> None:
    scores = np.zeros(205)
    scores[2::5] = 1
    assert slice_peaks(scores).tolist() == list(range(2, 205, 5))


def test_the_distance_holds_for_the_peaks_of_a_ranking() -> None:
    order, tiers = ranked_slices([0, 5, 0, 4, 0], [False] * 5, distance=2)
    assert order[:2].tolist() == [1, 3]
    assert tiers.tolist() == [0, 0, 2, 2, 2]


def test_a_slice_beside_one_that_was_taken_up_comes_last_at_the_border_too() -> None:
    order, tiers = ranked_slices([1, 2, 2, 3], [False] * 4, distance=2)  # no peak: it only rises
    assert order.tolist() == [3, 1, 2, 0]
    assert tiers.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("scores", [[[1.0, 2.0]], [1.0, float("nan")]])
def test_scores_that_are_not_one_number_a_slice(scores) -> None:
    with pytest.raises(ValueError, match=r"^slice peaks need one number a slice$"):
        slice_peaks(scores)
