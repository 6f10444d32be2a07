# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Stochastic batches by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lib.selectors.stochastic import stochastic_batch


def test_a_shorter_last_group_counts_only_on_request() -> None:
    scores = [0, 0, 0, 0, 9]
    batches = [stochastic_batch(scores, 2, np.random.default_rng(seed)) for seed in range(20)]
    assert {len(batch) for batch in batches} == {2}
    kept = [stochastic_batch(scores, 2, np.random.default_rng(seed), keep_last=True) for seed in range(20)]
    assert {len(batch) for batch in kept} == {1, 2}
    assert all(4 in batch for batch in kept)


def test_groups_of_one_are_the_best_unit() -> None:
    assert stochastic_batch([1, 3, 2], 1, np.random.default_rng(0)).tolist() == [1]


def test_a_single_group_is_what_the_draw_gives() -> None:
    for resample in (False, True):
        rng, same = np.random.default_rng(5), np.random.default_rng(5)
        expected = same.choice(10, 4, replace=False) if resample else same.permutation(10)[:4]
        found = stochastic_batch(np.arange(10), 4, rng, groups=1, resample=resample)
        np.testing.assert_array_equal(found, expected)


def test_errors_in_full() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^a stochastic batch needs one finite score a unit$"):
        stochastic_batch([[1.0]], 1, rng)
    with pytest.raises(ValueError, match=r"^statistic must be one of mean, sum, max, found 'median'$"):
        stochastic_batch([1, 2], 1, rng, statistic="median")
    with pytest.raises(ValueError, match=r"found k = 1, groups = 0$"):
        stochastic_batch([1, 2], 1, rng, groups=0)
