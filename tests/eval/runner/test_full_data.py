# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The full-data line: whole labels sent, one round measured, drawn and listed but never ranked."""

import json

import numpy as np
import pandas as pd
import pytest

from eval.__main__ import main
from eval.protocol.dataset import read_dataset
from eval.protocol.study import load_study
from eval.protocol.volumes import read_volume
from eval.reporting.figures import learning_curves
from eval.reporting.summary import full_line, mean_curves, summarise
from eval.runner.grid import plan
from eval.runner.run import Options, resume_run, start_run

QUIET = Options(quiet=True)


def test_every_pool_label_is_sent_whole_and_measured(write_study, stand_in, tmp_path, data):
    out = tmp_path / "out"
    start_run(load_study(write_study(methods=["random"], rounds=2, full_data=True)), out, QUIET)
    truth = {case.id: read_volume(case.label)[0] for case in read_dataset(data).cases}
    manifest = json.loads((out / "manifest.json").read_text())
    memory = json.loads((out / "cells" / "full_data_s1" / "studies" / "standin.json").read_text())
    assert set(memory["whole"]) == set(manifest["data"]["pool"]["images"])
    for image, label_xyz in memory["whole"].items():
        np.testing.assert_array_equal(label_xyz, truth[image])
    rounds = pd.read_csv(out / "rounds.csv")
    assert rounds[["method", "round"]].to_numpy().tolist() == [["random", 0], ["random", 1], ["full_data", 0]]
    full = rounds.iloc[-1]
    assert full["foreground_fraction"] == 1.0
    assert full["voxels"] == manifest["data"]["pool"]["voxels"]
    assert set(pd.read_csv(out / "cases.csv")["method"]) == {"random", "full_data"}
    assert set(pd.read_csv(out / "queries.csv")["method"]) == {"random"}
    assert main(["report", str(out)]) == 0
    html = (out / "report.html").read_text()
    assert "<td>full_data</td>" in html
    summary = summarise(rounds)
    assert summary["method"].tolist() == ["random", "full_data"]
    assert np.isnan(summary["aubc"].iloc[-1])
    assert list(mean_curves(rounds, "mean_dice", "regions")) == ["random"]
    line = learning_curves(rounds, ["mean_dice"], ["regions"]).axes[0].get_lines()[-1]
    assert line.get_label() == "full data"
    assert line.get_ydata()[0] == full_line(rounds, "mean_dice") == full["mean_dice"]


@pytest.mark.slow
def test_a_study_may_have_the_line_only(write_study, stand_in, tmp_path):
    changes = {"methods": [], "rounds": 1, "starting_budget": None, "batch": None, "size": None, "full_data": True}
    study = load_study(write_study(seeds=[1, 2], **changes))
    assert plan(study) == [
        "full_data seed 1: 1 round, every label of the pool",
        "full_data seed 2: 1 round, every label of the pool",
    ]
    start_run(study, tmp_path / "out", QUIET)
    assert len(pd.read_csv(tmp_path / "out" / "rounds.csv")) == 2
    stand_in.calls.clear()
    resume_run(tmp_path / "out", QUIET)
    assert stand_in.calls == []
    assert main(["report", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "a study needs methods, or full_data: true"),
        ({"methods": ["full_data"]}, "give the method another label"),
        ({"starting_budget": None}, "methods need a starting_budget and a batch"),
        ({"batch": None, "full_data": True}, "methods need a starting_budget and a batch"),
    ],
)
def test_studies_that_cannot_be(write_study, capsys, tmp_path, changes, message):
    assert main(["run", str(write_study(**changes)), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_minutes_are_the_ledgers_where_it_has_them(write_study, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in, "minutes_each", 2.0)
    study = load_study(write_study(methods=["random"], rounds=2, minutes={"recorded": True}))
    start_run(study, tmp_path / "out", QUIET)
    assert pd.read_csv(tmp_path / "out" / "queries.csv")["minutes"].tolist() == [2, 4, 6, 8, 10]
    assert pd.read_csv(tmp_path / "out" / "rounds.csv")["minutes"].tolist() == [12, 30]


def test_without_recorded_minutes_the_model_stays(write_study, stand_in, tmp_path):
    study = load_study(
        write_study(methods=["random"], rounds=1, minutes={"recorded": True, "region": 0.5, "slice": 0, "mm": 0})
    )
    start_run(study, tmp_path / "out", Options(quiet=True))
    assert pd.read_csv(tmp_path / "out" / "queries.csv")["minutes"].tolist() == [0.5, 0.5, 0.5]
