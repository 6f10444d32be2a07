# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Summary and report: hand-computed numbers, a self-contained file with its figures and tables."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from eval.__main__ import main
from eval.protocol.study import load_study
from eval.records.rows import case_rows, class_means, round_row
from eval.reporting.summary import mean_curves, plain_table, summarise
from eval.runner.run import Options, start_run


def rounds_table():
    rows = []
    for method, seed, dices in [
        ("a", 1, [0.2, 0.6, 0.8]),
        ("a", 2, [0.4, 0.6, 0.6]),
        ("b", 1, [0.2, 0.4, 0.9]),
        ("b", 2, [0.4]),
    ]:
        for i, value in enumerate(dices):
            budget = {
                "regions": 3 + 2 * i,
                "voxels": 100 * i,
                "foreground_voxels": 10 * i,
                "foreground_fraction": i / 10,
            }
            rows.append({"method": method, "seed": seed, "round": i, "mean_dice": value, "mean_hd95": 3 - i, **budget})
    return pd.DataFrame(rows)


def test_summary_by_hand():
    table = summarise(rounds_table()).set_index("method")
    assert table.loc["a", "aubc"] == pytest.approx((0.55 + 0.55) / 2)
    assert table.loc["a", "final_dice"] == pytest.approx(0.7)
    assert table.loc["a", "final_dice_sd"] == pytest.approx(np.sqrt(0.02))
    assert table.loc["b", "seeds"] == 1  # the second seed is not finished
    assert table.loc["b", "aubc"] == pytest.approx((0.3 + 0.65) / 2)
    assert table.loc["b", "regions"] == 7
    assert np.isnan(table.loc["b", "aubc_sd"])


def test_curves_by_hand():
    curve = mean_curves(rounds_table(), "mean_dice", "regions")["a"]
    assert curve["cost"].tolist() == [3, 5, 7]
    np.testing.assert_allclose(curve["mean"], [0.3, 0.6, 0.7])
    np.testing.assert_allclose(curve["sd"], [np.sqrt(0.02), 0, np.sqrt(0.02)])


def test_terminal_table_lines_up():
    lines = plain_table(summarise(rounds_table())).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "0.5500 ± 0.0000" in lines[2]


def test_case_rows_leave_undefined_measures_out():
    truth = np.zeros((4, 4, 4), dtype=np.uint8)
    truth[1, 1, 1] = 1
    rows = case_rows(truth, truth, {"one": 1, "two": 2}, (1, 1, 1))
    assert rows[0]["dice"] == 1.0
    assert rows[0]["hausdorff95"] == 0.0
    assert rows[1]["dice"] is None
    assert rows[1]["relative_volume_error"] is None


def test_case_rows_by_hand():
    truth, prediction = np.zeros((1, 2, 10), dtype=np.uint8), np.zeros((1, 2, 10), dtype=np.uint8)
    prediction[0, 0, 2], truth[0, 0, [3, 5]] = 1, 1  # on a line, 2.5 mm per step: directed {2.5}; {2.5, 7.5}
    row = case_rows(prediction, truth, {"one": 1}, (1, 1, 2.5), tolerance=2.5)[0]
    assert row == pytest.approx(
        {
            "class": "one",
            "dice": 0.0,
            "dice_2d": 0.0,
            "hausdorff95": 7.25,
            "hausdorff95_pooled": 7.0,
            "hausdorff": 7.5,
            "mean_surface_distance": 12.5 / 3,
            "surface_dice": 2 / 3,
            "relative_volume_error": 50.0,
            "sensitivity": 0.0,
            "specificity": 17 / 18,
        }
    )


def test_means_skip_what_is_undefined():
    rows = [{"class": "a", "dice": 0.5}, {"class": "a", "dice": None}, {"class": "b", "dice": None}]
    means = class_means(rows, "dice", ["a", "b"])
    assert means["a"] == 0.5
    assert np.isnan(means["b"])


def test_round_row_by_hand():
    costs = {"foreground_slices": 2.0, "border_mm": 5.0, "minutes": 0.5}
    regions = [{"size": [2, 3, 4], "classes": {"background": 20, "a": 3, "b": 1}, "costs": costs}] * 2
    tested = [{"class": c, "dice": d, "hausdorff95": h} for c, d, h in [("a", 0.5, 2), ("a", 0.7, 4), ("b", 1.0, 0)]]
    row = round_row(regions, tested, ["a", "b"], pool_foreground=80)
    assert row == pytest.approx(
        {
            "regions": 2,
            "voxels": 48,
            "foreground_voxels": 8,
            "foreground_fraction": 0.1,
            "mean_dice": 0.8,
            "dice_a": 0.6,
            "dice_b": 1.0,
            "mean_hd95": 1.5,
            "foreground_slices": 4.0,
            "border_mm": 10.0,
            "minutes": 1.0,
        }
    )


@pytest.fixture
def finished(write_study, stand_in, tmp_path):
    start_run(load_study(write_study(rounds=2)), tmp_path / "out", Options(quiet=True))
    return tmp_path / "out"


def test_report_is_one_self_contained_file(finished, capsys):
    assert main(["report", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "final Dice" in shown
    assert str(finished / "report.html") in shown
    html = (finished / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    for name in ("summary", "rounds", "asked", "seconds"):
        assert f'<table id="{name}"' in html
    figures = re.findall(r'src="data:(image/[a-z+]+);base64,([^"]+)"', html)
    # curves, other costs, classes, distances, foreground share; no penalties with one seed
    assert [kind for kind, _ in figures] == ["image/svg+xml"] * 5 + ["image/png"] * 2
    tables = {path.name for path in (finished / "tables").iterdir()}
    assert tables == {
        f"{name}.{kind}" for name in ("summary", "areas", "significance", "tails") for kind in ("csv", "tex")
    }
    assert r"\begin{tabular}" in (finished / "tables" / "areas.tex").read_text()
    assert r"power\_pe" in (finished / "tables" / "areas.tex").read_text()
    for kind, content in figures:
        start = base64.b64decode(content)[:200]
        assert start.startswith(b"\x89PNG") if kind == "image/png" else b"<?xml" in start
    final = pd.read_csv(finished / "rounds.csv").query("method == 'random'")["mean_dice"].iloc[-1]
    assert f"{final:.4f}" in html
    plots = {path.stem: path for path in (finished / "plots").iterdir()}
    assert set(plots) == {"costs", "share", "per_class", "distance"}  # no penalties with one seed
    for path in (finished / "learning_curves.png", *plots.values()):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_agreement_between_annotators_is_that_of_the_last_training(finished):
    path = next(finished.glob("cells/random_s*/state.json"))
    state = json.loads(path.read_text())
    for round_, dice in ((0, 0.5), (1, 0.75)):
        one = {"mean_dice": dice, "regions": 1 + round_}
        state["steps"][f"{round_}.train"]["agreement"] = {"one": one, "two": {"mean_dice": None, "regions": 0}}
    path.write_text(json.dumps(state))
    assert main(["report", "--no-pictures", str(finished)]) == 0
    table = pd.read_csv(finished / "tables" / "readers.csv")
    assert table.drop(columns="seed").to_dict("records") == [
        {"method": "random", "class": "one", "mean_dice": 0.75, "regions": 2}
    ]
    assert "Agreement between annotators" in (finished / "report.html").read_text()


def test_report_without_pictures(finished):
    assert main(["report", "--no-pictures", str(finished)]) == 0
    assert "image/png" not in (finished / "report.html").read_text()


def test_report_without_the_scans(finished, data):
    import shutil

    shutil.rmtree(data)
    assert main(["report", str(finished)]) == 0
    assert "image/png" not in (finished / "report.html").read_text()
