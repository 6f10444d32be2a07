# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Study measures against hand-computed values and nnActive's own results."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics.significance import holm_adjust
from eval.metrics.study import (
    aubc,
    foreground_efficiency,
    kendall,
    mean_ranks,
    paired_wins,
    pairwise_penalty,
)


@pytest.fixture(scope="module")
def golden(reference):
    return np.load(reference / "nnactive/study.npz")


@pytest.fixture(scope="module")
def table(golden):
    columns = {key: golden[f"table_{key}"] for key in ("uncertainty", "seed", "loop", "patches", "dice", "fg")}
    return pd.DataFrame(columns)


def test_aubc_by_hand():
    assert aubc([0.2, 0.6, 0.8]) == pytest.approx((0.4 + 0.7) / 2)
    assert aubc([0.2, 0.6, 0.8], cost=[0, 10, 40]) == pytest.approx((0.4 * 10 + 0.7 * 30) / 40)
    assert aubc([0.5]) == 0.5
    # From 5 (0.4) over 10 (0.6) to 25 (0.7).
    assert aubc([0.2, 0.6, 0.8], [0, 10, 40], (5, 25)) == pytest.approx((0.5 * 5 + 0.65 * 15) / 20)
    with pytest.raises(ValueError, match="within the costs"):
        aubc([0.2, 0.6], [0, 10], (5, 11))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0.1, 50))
def test_aubc_lies_within_the_curve_and_ignores_the_unit_of_cost(values, step):
    area = aubc(values)
    assert min(values) - 1e-12 <= area <= max(values) + 1e-12
    assert aubc(values, cost=np.arange(len(values)) * step + 3) == pytest.approx(area)


@pytest.mark.parametrize(
    ("values", "cost", "message"),
    [([], None, "at least one"), ([1, 2], [1], "as many costs"), ([1, 2], [5, 5], "must increase")],
)
def test_unusable_curves_are_refused(values, cost, message):
    with pytest.raises(ValueError, match=message):
        aubc(values, cost)


def test_aubc_matches_nnactive(golden, table):
    for key, expected, last in zip(golden["auc_keys"], golden["auc"], golden["final"], strict=True):
        method, seed = str(key).split("|")
        curve = table[(table.uncertainty == method) & (table.seed == int(seed))].sort_values("loop").dice.to_numpy()
        assert aubc(curve) == pytest.approx(float(expected), abs=1e-12)
        assert curve[-1] == pytest.approx(float(last))


def test_efficiency_recovers_a_known_rate():
    x = np.linspace(0.01, 0.3, 8)
    y = 0.8 - 0.4 * np.exp(-12.5 * (x - 0.01))
    assert foreground_efficiency(x, y, 0.8) == pytest.approx(12.5, rel=1e-6)
    assert foreground_efficiency(x, y, 0.8, bounded=True) == pytest.approx(12.5, rel=1e-4)
    with pytest.raises(ValueError, match="not below"):
        foreground_efficiency(x, y, 0.3)


def test_efficiency_matches_nnactive(golden, table):
    a, c, x0 = (float(golden[f"beta_{k}"]) for k in ("a", "c", "x_offset"))
    for method, expected in zip(golden["beta_keys"], golden["beta"], strict=True):
        rows = table[table.uncertainty == method]
        ours = foreground_efficiency(rows.fg, rows.dice, c, start_fraction=x0, start_dice=c - a)
        assert ours == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("holm", "key"), [(False, "ppm_stored"), (True, "ppm_holm_stored")])
def test_penalties_match_nnactive(golden, table, holm, key):
    methods = [str(m) for m in golden["ppm_algs"]]
    scores = {
        m: table[table.uncertainty == m].pivot_table(index="seed", columns="loop", values="dice").to_numpy()
        for m in methods
    }
    stored = golden[key]  # stored[i][j]: i is beaten by j
    ours = pairwise_penalty(scores, holm=holm)
    np.testing.assert_allclose(ours.loc[methods, methods].to_numpy(), stored.T, atol=1e-12)


def test_constant_differences_win_unless_they_are_zero():
    scores = {"a": [[0.5, 0.7], [0.5, 0.7]], "b": [[0.5, 0.6], [0.5, 0.6]]}
    wins = paired_wins(scores)
    assert wins[["winner", "loser", "budget"]].to_numpy().tolist() == [["a", "b", 1]]
    with pytest.raises(ValueError, match="two or more"):
        paired_wins({"a": [[0.5]], "b": [[0.6]]})


def test_holm_by_hand():
    np.testing.assert_allclose(holm_adjust([0.01, 0.04, 0.03, np.nan]), [0.04, 0.09, 0.09, 1.0])


def test_mean_ranks_by_hand():
    table = pd.DataFrame({"a": [0.901, 0.7], "b": [0.902, 0.6], "c": [0.5, 0.6]})
    assert mean_ranks(table).to_dict() == {"a": 1.5, "b": 1.5, "c": 2.5}
    assert mean_ranks(table, decimals=2).to_dict() == {"a": 1.0, "b": 1.5, "c": 2.5}


def test_kendall_by_hand():
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]).tau == pytest.approx(4 / 6)
    assert kendall([1, 2, 3], [3, 2, 1]).tau == pytest.approx(-1)
    with pytest.raises(ValueError, match="equally long"):
        kendall([1, 2], [1, 2, 3])


def test_the_effect_of_a_setting_matches_nnactive(reference):
    golden = np.load(reference / "nnactive/kendall.npz")
    for m in range(len(golden["methods"])):
        values = golden["values"][:, m]
        effect = kendall(values.ravel(), np.repeat(np.arange(len(values)), values.shape[1]))
        assert effect.tau == pytest.approx(float(golden["corr"][m]))
        assert effect.p == pytest.approx(float(golden["pval"][m]))


@pytest.mark.parametrize(("fractions", "dices"), [([0.1], [0.5]), ([0.1, 0.2], [0.5]), ([[0.1, 0.2]], [[0.5, 0.6]])])
def test_efficiency_of_less_than_two_points_is_refused(fractions, dices):
    with pytest.raises(ValueError, match=r"needs two or more \(fraction, Dice\) pairs"):
        foreground_efficiency(fractions, dices, 0.9)
