# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Published numbers: spot-checked against the papers' texts, and measured by hand on small runs."""

import numpy as np
import pandas as pd
import pytest

from eval.reporting.literature import PUBLISHED, Numbers, beside, measured, read_published, settings, share_for_full
from eval.runner.grid import load_grid
from tests.eval.conftest import ROOT

PAPERS = ("nnactive", "usim", "burmeister", "stochastic_batches", "uss")
NOTHING = Numbers(*[pd.DataFrame(columns=["method"])] * 4)


# A second reading of the papers: setting, method, metric, mean and deviation, and the place in the paper.
FACTS = [
    ("nnactive/acdc/low", "power_bald", "aubc", (0.8118, 0.0058), "Table 6"),
    ("burmeister/heart/slices", "stratified", "final_dice", (0.899, 0.001), "Table 1, iteration 50"),
    ("burmeister/heart/strided", "strided_15", "round5_dice", (0.816, 0.039), "Table 4, iteration 5"),
    (
        "burmeister/hippocampus/signed_distance",
        "strided_uncertainty_10",
        "final_dice",
        (0.807, 0.014),
        "Table 8, iteration 50",
    ),
    ("burmeister/prostate/interpolation", "signed_distance_15", "pseudo_dice", (0.811, 0.167), "Table 10"),
    ("stochastic_batches/promise12/starts", "dropout_jsd_stochastic", "cycles_dice", (0.7259, 0.1496), "Table 1"),
    ("stochastic_batches/hippocampus/starts", "core_set", "cycles_hausdorff95:Posterior", (4.52, 0.53), "Table 1"),
    ("stochastic_batches/hippocampus/starts", "learning_loss", "cycles_dice_2d:Anterior", (0.697, 0.0092), "Table 1"),
    ("stochastic_batches/promise12/initial_15", "entropy", "cycles_dice", (0.7319, 0.0754), "Table 3"),
    ("uss/liver/iterations", "uss", "final_dice", (0.960, 0.027), "Table 4, iteration 5"),
    ("uss/liver/iterations", "rss", "round2_hausdorff", (29.6, 22.0), "Table 7, iteration 2"),
    ("uss/liver/converged", "rvs", "final_relative_volume_error", (4.41, 5.33), "Table 8"),
    ("uss/liver/converged", "slice", "effect_mean_surface_distance_p95", (-0.48, np.nan), "Table 9"),
    ("usim/hippocampus/slices", "usim_c", "share_for_full", (0.30, np.nan), "Section 4.3, roughly"),
]


@pytest.mark.parametrize(("setting", "method", "metric", "numbers", "place"), FACTS)
def test_numbers_are_those_of_the_papers(setting, method, metric, numbers, place):
    row = read_published(setting).query("method == @method and metric == @metric").squeeze()
    assert (row["mean"], row["sd"]) == pytest.approx(numbers, nan_ok=True)
    assert row["table"] == place


def test_tables_are_whole_and_plausible():
    sizes = {name: len(pd.read_csv(PUBLISHED / f"{name}.csv")) for name in PAPERS}
    # stochastic batches: 10 methods x 9 columns, 9 methods x 5 starts, 9 x 3; USS: 4 tables x (5 + 1) rows x 4 x 2 ...
    assert sizes["stochastic_batches"] == 90 + 45 + 27
    assert sizes["uss"] == 4 * 6 * 4 * 2 + 4 * 2 - 1 + 5 * 4 * 2 + 12
    assert sizes["burmeister"] == 5 * (18 + 2 * (9 + 6 + 9)) + 16
    assert sizes["nnactive"] == 300
    for name in PAPERS:
        table = pd.read_csv(PUBLISHED / f"{name}.csv")
        assert not table.duplicated(["dataset", "regime", "method", "metric"]).any()
        dices = table[table["metric"].str.contains("dice|aubc") & ~table["metric"].str.contains("effect")]
        assert dices["mean"].between(0.2, 1).all()
        assert (dices["sd"].dropna() < 0.3).all()


def test_studies_name_settings_and_methods_that_are_there():
    known = set(settings())
    for path in (ROOT / "eval" / "studies").glob("*.yaml"):
        for study in load_grid(path):
            if study.published:
                assert study.published in known
                labels = {method.label for method, _ in study.lines}
                there = set(read_published(study.published)["method"])
                assert len(there & labels) >= min(2, len(there)), study.name
                paper, _, _ = study.published.partition("/")
                if paper in PAPERS and path.stem == paper:
                    assert there <= labels | {"full_data"}, study.name


def test_the_published_table_agrees_with_itself():
    own = read_published("nnactive/hippocampus/low")
    wide = own.pivot(index="method", columns="metric", values="mean").reset_index()
    numbers = NOTHING._replace(summary=wide.drop(columns="fg_eff"), fits=wide[["method", "fg_eff"]])
    both, taus = beside("nnactive/hippocampus/low", numbers)
    assert (both["published"] == both["ours"]).all()
    assert taus["tau_b"].tolist() == pytest.approx([1, 1, 1])
    assert taus["methods"].tolist() == [8, 8, 8]
    assert all(part.empty for part in beside("", numbers))
    assert all(part.empty for part in beside("nnactive/moon/low", numbers))


@pytest.fixture
def numbers():
    def row(method, round_, case, name, dice, distance):
        return {"method": method, "seed": 1, "round": round_, "case": case, "class": name, "dice": dice, "hd": distance}

    cases = [
        row("a", 0, "x", "P", 0.0, 9),
        row("a", 1, "x", "P", 0.5, 4),
        row("a", 1, "x", "Q", 0.7, 2),
        row("a", 2, "x", "P", 0.6, 3),
        row("a", 2, "y", "P", 0.8, 1),
        row("a", 2, "x", "Q", 0.9, 1),
        row("full_data", 0, "x", "P", 1.0, 0),
    ]
    rounds = pd.DataFrame(
        [
            {"method": "a", "seed": 1, "round": i, "mean_dice": d, "voxels": 10 * i}
            for i, d in enumerate([0.5, 0.8, 0.9])
        ]
        + [{"method": "full_data", "seed": 1, "round": 0, "mean_dice": 0.805, "voxels": 40}]
    )
    return NOTHING._replace(rounds=rounds, cases=pd.DataFrame(cases))


@pytest.mark.parametrize(
    ("metric", "ours"),
    [
        ("final_dice", 0.8),  # (0.7 of P + 0.9 of Q) / 2
        ("final_dice:P", 0.7),
        ("final_dice_p50", 0.8),
        ("round1_dice", 0.6),
        ("cycles_dice", 0.7),
        ("cycles_hd:Q", 1.5),
        ("final_hd_p95", 2.8),
        ("share_for_full", 10 / 40),
    ],
)
def test_own_values_are_taken_as_the_papers_take_them(numbers, metric, ours):
    found = measured([metric], numbers)
    assert found[found["method"] == "a"]["ours"].item() == pytest.approx(ours)


def test_unknown_metrics_are_left_out(numbers):
    assert measured(["effect_dice_p5", "final_volume", "nothing"], numbers).empty
    assert share_for_full(numbers.rounds[numbers.rounds["method"] == "a"]).empty
