# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lib.selectors.noise import beta_at, exponential_schedule, power, sigmoid_schedule, softrank


@pytest.mark.parametrize("beta", [1, 5, 20])
def test_published_power_noise(reference: Path, beta: int) -> None:
    golden = np.load(reference / "nnactive/noise.npz")
    seed = int(golden["seed"])
    noisy = power(golden["scores"], beta, np.random.default_rng(seed))
    np.testing.assert_allclose(noisy, golden[f"power_b{beta}"], rtol=1e-12)


def test_published_schedules(reference: Path) -> None:
    golden = np.load(reference / "nnactive/noise.npz")
    np.testing.assert_allclose(exponential_schedule(5, 1, 100), golden["exp_schedule_5_1_100"])
    np.testing.assert_allclose(exponential_schedule(9, 1, 100), golden["exp_schedule_9_1_100"])
    np.testing.assert_allclose(sigmoid_schedule(5, 1, 100), golden["sigmoid_schedule_5_T2"])
    np.testing.assert_allclose(sigmoid_schedule(5, 1, 100, 0.5), golden["sigmoid_schedule_5_T05"])


def test_negative_scores_come_last_where_published_code_ranks_them_first(reference: Path) -> None:
    golden = np.load(reference / "nnactive/noise.npz")
    scores = golden["neg_scores"]
    noisy = power(scores, 1, np.random.default_rng(int(golden["seed"])))
    published = golden["neg_power_b1"]
    assert np.isnan(published[scores < 0]).all()
    assert (noisy[scores <= 0] == -np.inf).all()
    np.testing.assert_allclose(noisy[scores > 0], published[scores > 0], rtol=1e-12)


def test_power_noise_samples_in_proportion_to_score_to_the_beta() -> None:
    scores, rng = np.array([1.0, 2.0, 4.0, 0.0]), np.random.default_rng(0)
    firsts = [int(power(scores, 2.0, rng).argmax()) for _ in range(6000)]
    counts = np.bincount(firsts, minlength=4)
    assert counts[3] == 0
    expected = scores[:3] ** 2 / (scores[:3] ** 2).sum() * 6000
    assert stats.chisquare(counts[:3], expected).pvalue > 1e-3


def test_softrank_samples_in_proportion_to_one_over_rank_to_the_beta() -> None:
    scores, rng = np.array([0.1, 0.9, 0.5]), np.random.default_rng(1)
    firsts = [int(softrank(scores, 1.0, rng).argmax()) for _ in range(6000)]
    weights = np.array([1 / 3, 1, 1 / 2])
    assert stats.chisquare(np.bincount(firsts, minlength=3), weights / weights.sum() * 6000).pvalue > 1e-3


def test_beta_of_a_round() -> None:
    assert beta_at("exponential", 2, 5, 1, 100) == pytest.approx(10)
    assert beta_at("exponential", 9, 5, 1, 100) == pytest.approx(100)
    assert beta_at("constant", 3, 5, 2, 100) == 2
    assert beta_at("sigmoid", 0, 1, 3, 100) == 3
    with pytest.raises(ValueError, match="schedule must be one of"):
        beta_at("linear", 0, 5, 1, 100)
    with pytest.raises(ValueError, match="beta must be above zero"):
        power(np.ones(3), 0, np.random.default_rng(0))
