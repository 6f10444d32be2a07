# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Comparison of methods from rounds.csv: by hand, and against the published table itself."""

import numpy as np
import pandas as pd
import pytest

from eval.reporting.compare import (
    areas,
    between_settings,
    complete,
    effects,
    efficiency,
    penalties,
    ranks,
    significance,
    tails,
)
from eval.reporting.summary import summarise


def curve(method, seed, dices, fractions=(0.1, 0.2, 0.4), costs=(10, 20, 30)):
    return [
        {
            "method": method,
            "seed": seed,
            "round": i,
            "mean_dice": dice,
            "mean_hd95": 1.0,
            "regions": 10 * (i + 1),
            "voxels": costs[i],
            "foreground_voxels": 5 * (i + 1),
            "foreground_fraction": fractions[i],
            "minutes": costs[i] / 2,
        }
        for i, dice in enumerate(dices)
    ]


@pytest.fixture
def rounds():
    rows = []
    for seed, lift in [(1, 0.0), (2, 0.01), (3, 0.02)]:
        rows += curve("good", seed, [0.5 + lift, 0.7 + lift, 0.8 + lift])
        rows += curve("poor", seed, [0.5 + lift, 0.5 + lift + seed / 1000, 0.6 + lift], costs=(10, 30, 50))
    rows += curve("good", 4, [0.9])  # unfinished
    rows += [{**row, "round": 0} for row in curve("full_data", 1, [0.9])]
    return pd.DataFrame(rows)


def test_only_seeds_that_all_have_finished_are_compared(rounds):
    assert set(complete(rounds)["seed"]) == {1, 2, 3}
    assert set(complete(rounds)["method"]) == {"good", "poor"}


def test_areas_by_hand(rounds):
    table = areas(rounds).set_index("method")
    assert table.loc["good", "steps"] == pytest.approx((0.6 + 0.75) / 2 + 0.01)
    # Voxels: both reached 10 to 30. good as above; poor from 0.5 to 0.502 there.
    assert table.loc["good", "voxels"] == pytest.approx(0.675 + 0.01)
    assert table.loc["poor", "voxels"] == pytest.approx(0.501 + 0.01)
    assert table.loc["poor", "minutes"] == pytest.approx(table.loc["poor", "voxels"])
    assert np.isnan(table.loc["good", "border_mm"])


def test_penalties_and_ranks_by_hand(rounds):
    matrix, tidy = penalties(rounds)
    assert matrix.loc["good", "poor"] == pytest.approx(2 / 3)  # budgets 1 and 2
    assert matrix.loc["poor", "good"] == 0
    assert tidy[["winner", "loser", "budget"]].to_numpy().tolist() == [["good", "poor", 1], ["good", "poor", 2]]
    table = ranks(rounds, np.random.default_rng(0)).set_index("method")
    assert table.loc["good"].tolist() == [1] * 5
    assert penalties(rounds[rounds["seed"] == 1]) is None
    assert ranks(rounds[rounds["seed"] < 3], np.random.default_rng(0)).empty


def test_efficiency_needs_a_full_data_line_above_the_start(rounds):
    table = efficiency(rounds, np.random.default_rng(0)).set_index("method")
    assert table.loc["good", "low"] <= table.loc["good", "bounded"] <= table.loc["good", "high"]
    assert table.loc["good", "fg_eff"] > table.loc["poor", "fg_eff"] > 0
    assert efficiency(rounds[rounds["method"] != "full_data"], np.random.default_rng(0)).empty
    low = rounds.assign(mean_dice=rounds["mean_dice"].where(rounds["method"] != "full_data", 0.1))
    assert efficiency(low, np.random.default_rng(0)).empty


def test_tails_take_the_last_round():
    rows = [
        {"method": "a", "seed": 1, "round": r, "dice": d, "hausdorff95": h, "mean_surface_distance": h}
        for r, d, h in [(0, 0.0, 99), (1, 0.5, 1), (1, 1.0, 3)]
    ]
    table = tails(pd.DataFrame(rows))
    assert table.loc[0, "dice_p5"] == pytest.approx(0.525)
    assert table.loc[0, "hausdorff95_p95"] == pytest.approx(2.9)


def test_every_pair_is_tested_three_ways(rounds):
    rows = [
        {"method": m, "seed": s, "round": 2, "case": c, "class": k, "dice": d + c / 100 * (m == "good")}
        for m, d in [("good", 0.8), ("poor", 0.7)]
        for s in (1, 2)
        for c in range(5)
        for k in ("a", "b")
    ]
    cases = pd.DataFrame([{**rows[0], "round": 1, "dice": 0.0}, *rows])
    table = significance(rounds, cases, np.random.default_rng(0)).set_index("pairs")
    seeds, tested = table.loc["seeds, AUBC"], table.loc["cases, final Dice"]
    assert (seeds["first"], seeds["second"], seeds["n"], tested["n"]) == ("good", "poor", 3, 5)
    assert seeds["difference"] == pytest.approx(0.675 - (0.501 + 0.551) / 2 + 1e-9, abs=2e-3)
    assert (seeds["p_permutation"], tested["p_permutation"]) == (0.25, 2 / 2**5)
    assert tested["difference"] == pytest.approx(0.12)
    assert (tested["p_wilcoxon"], tested["holm_wilcoxon"]) == (2 / 2**5, 2 / 2**5)
    assert significance(rounds[rounds["seed"] == 1], cases[cases["case"] == 0], np.random.default_rng(0)).empty


def test_three_methods_make_a_family_of_three():
    rows = [
        {"method": m, "seed": 1, "round": 0, "case": c, "dice": d * (c % 7) / 7 + c / 90}
        for m, d in [("a", 0.1), ("b", 0.2), ("c", 0.21)]
        for c in range(12)
    ]
    table = significance(
        pd.DataFrame({"method": [], "seed": [], "round": [], "mean_dice": []}),
        pd.DataFrame(rows),
        np.random.default_rng(0),
    )
    assert len(table) == 3
    smallest = table["p_t"].idxmin()
    assert table.loc[smallest, "holm_t"] == pytest.approx(3 * table.loc[smallest, "p_t"])


def test_effects_of_what_methods_share():
    # Two factors that add up: quantiles of constant groups are those constants.
    dice = {"uss": 0.9, "rss": 0.8, "uvs": 0.7, "rvs": 0.6}
    rows = [
        {"method": m, "seed": 1, "round": 5, "dice": d, "hausdorff95": 10 * d, "mean_surface_distance": d}
        for m, d in dice.items()
        for _ in range(4)
    ]
    factors = {"uncertainty": ["uss", "uvs"], "slice": ["uss", "rss"]}
    table = effects(pd.DataFrame(rows), factors).set_index("measure")
    assert table.loc["dice"].tolist() == pytest.approx([0.05, 0.6, 0.1, 0.2])
    assert table.loc["hausdorff95"].tolist() == pytest.approx([0.95, 6, 1, 2])
    assert effects(pd.DataFrame(rows), {}).empty
    assert effects(pd.DataFrame(rows), {"all": list(dice)}).empty  # nothing to compare with


def test_settings_are_compared_pair_by_pair(rounds):
    summary = summarise(rounds)
    table = between_settings({"one": summary, "two": summary})
    assert table[["first", "second", "tau_aubc"]].to_numpy().tolist() == [["one", "two", 1.0]]
