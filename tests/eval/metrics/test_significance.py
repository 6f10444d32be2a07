# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Paired tests against hand-computed values and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_rel, wilcoxon

from eval.metrics.significance import paired_p


def test_permutations_by_hand():
    # Differences 1, 2, 3: of 8 sign flips only the identity and its mirror reach |sum| 6.
    assert paired_p([1, 2, 3], [0, 0, 0], "permutation") == pytest.approx(2 / 8)
    # Differences 1, 1, -1: |sum| >= 1 for every flip.
    assert paired_p([1, 1, 0], [0, 0, 1], "permutation") == 1.0
    assert paired_p([1, 1], [1, 1], "permutation") == 1.0


def test_wilcoxon_by_hand():
    # Five differences of one sign: 2 of 2^5 rank assignments are as extreme.
    assert paired_p([1, 2, 3, 4, 5], [0] * 5, "wilcoxon") == pytest.approx(2 / 32)
    assert paired_p([1, 1], [1, 1], "wilcoxon") == 1.0


def test_tests_agree_with_scipy():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=9), rng.normal(size=9)
    assert paired_p(a, b) == pytest.approx(ttest_rel(a, b).pvalue)
    assert paired_p(a, b, "wilcoxon") == pytest.approx(wilcoxon(a, b).pvalue)
    theirs = permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert paired_p(a, b, "permutation") == pytest.approx(theirs.pvalue)


def test_many_pairs_are_drawn():
    rng = np.random.default_rng(1)
    a = rng.normal(size=40)
    b = a + rng.normal(0.35, 1, size=40)
    drawn = paired_p(a, b, "permutation", rng=np.random.default_rng(0), permutations=4000)
    assert drawn == pytest.approx(paired_p(a, b), abs=0.03)
    assert drawn == paired_p(a, b, "permutation", rng=np.random.default_rng(0), permutations=4000)
    with pytest.raises(ValueError, match="pass a Generator"):
        paired_p(a, b, "permutation")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["t", "wilcoxon", "permutation"]))
def test_sides_and_order_do_not_matter(seed, test):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=6), rng.normal(size=6)
    order = rng.permutation(6)
    p = paired_p(a, b, test)
    assert 0 <= p <= 1
    assert paired_p(b, a, test) == pytest.approx(p)
    assert paired_p(a[order], b[order], test) == pytest.approx(p)


def test_undefined_pairs_are_left_out_and_bad_input_refused():
    assert paired_p([1, 2, np.nan, 4], [0, 0, 0, 0]) == paired_p([1, 2, 4], [0, 0, 0])
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_p([1], [0])
    with pytest.raises(ValueError, match="equally long"):
        paired_p([1, 2], [0])
    with pytest.raises(ValueError, match="none of"):
        paired_p([1, 2], [0, 1], "sign")
