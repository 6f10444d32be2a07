# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Grids: their expansion, and validity of every study in the folder, with existing methods."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.study import AUTO
from eval.runner.grid import forecast, load_grid, plan_grid
from eval.runner.replayed_queries import replayed
from eval.runner.run import Options, resume_grid, start_grid
from lib.models.recipe import Bundle
from lib.querying.methods import resolve
from tests.eval.conftest import ROOT

STUDIES = sorted((ROOT / "eval" / "studies").glob("*.yaml"))


def add(path: Path, **axes) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **axes}, sort_keys=False))
    return path


def test_a_grid_is_the_product_of_its_axes(write_study, data):
    regimes = {"low": {"batch": 2}, "high": {"batch": 3, "train": {"steps": 9}}}
    options = {"a": {"methods": ["random"]}, "b": {"query": {"stride": [2, 2, 2]}, "about": "{dataset} {regime}"}}
    datasets = {"one": {"size": [8, 8, 8]}, "two": {"regimes": {"own": {"batch": 4}}}}
    studies = load_grid(add(write_study(), datasets=datasets, regimes=regimes, options=options))
    names = [s.name for s in studies]
    expected = ["one_low_a", "one_low_b", "one_high_a", "one_high_b", "two_own_a", "two_own_b"]
    assert names == [f"small_{name}" for name in expected]
    high = studies[3]
    assert high.size == (8, 8, 8)
    assert (high.batch, high.train, high.about) == (3, {"members": 2, "steps": 9}, "one high")
    assert studies[4].batch == 4
    assert [m.label for m in studies[0].methods] == ["random"]


def test_unusable_axes_are_refused(write_study):
    with pytest.raises(RefereeError, match="regimes must map names to entries"):
        load_grid(add(write_study(), regimes=["low"]))
    with pytest.raises(RefereeError, match="two points of the grid are called small_a_b"):
        load_grid(add(write_study(), datasets={"a": {}, "a_b": {}}, regimes={"b": {}, "": {}}))


def test_expected_hours_and_disk_by_hand(write_study, data):
    study = load_grid(write_study(full_data=True, expected={"step_seconds": 10.0, "case_seconds": 1.0}))[0]
    # Methods 2 x 3 tests and the full-data line: 7, of 2 members on 2 cases. Round 0 is trained once: 6 times 3 steps.
    assert forecast(study)["hours"] == pytest.approx((6 * 2 * 3 * 10 * 1.2 + 7 * 2 * 2) / 3600)
    assert forecast(study)["cells"] == 3
    said = plan_grid([study])
    assert any("hours one cell at a time" in line for line in said)
    assert said[-1] == "at 10 s per step and 1 s per case"
    away = study.model_copy(update={"data": Path("nowhere")})
    assert "the data is not there" in plan_grid([study, away])[-1]


def test_a_grid_runs_in_folders_and_resumes(write_study, stand_in, tmp_path, monkeypatch):
    path = add(write_study(methods=["random"], rounds=2), regimes={"low": {}, "high": {"batch": 4}})
    studies, out, quiet = load_grid(path), tmp_path / "out", Options(quiet=True)
    monkeypatch.setattr(stand_in, "fail_on", "train 3")
    with pytest.raises(RefereeError, match="refuses"):
        start_grid(studies, out, quiet)
    monkeypatch.setattr(stand_in, "fail_on", None)
    folders = resume_grid(out, quiet)
    assert [f.name for f in folders] == ["small_low", "small_high"]
    assert pd.read_csv(folders[1] / "rounds.csv")["regions"].tolist() == [3, 7]
    again = replayed(folders[1], "random", 1, 1)
    own = pd.read_csv(folders[1] / "queries.csv").query("round == 1")
    assert [r["start"] for r in again] == own[["x", "y", "z"]].to_numpy().tolist()
    with pytest.raises(RefereeError, match="no query of random, seed 1, round 7"):
        replayed(folders[1], "random", 1, 7)
    with pytest.raises(RefereeError, match="does not exist"):
        replayed(tmp_path, "random", 1, 1)


def test_dry_run_prints_cells_and_sizes(write_study, capsys):
    slices = {"name": "strided", "options": {"unit": "slice", "batch": 5}}
    assert main(["run", str(write_study(methods=["power_pe", slices])), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "strided seed 1: 3 rounds, 13 regions (3 + 5 + 5)" in shown
    assert "power_pe seed 1: 3 rounds, 7 regions (3 + 2 + 2)" in shown
    assert "GB of disk" in shown


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_folder_is_valid(path):
    for study in load_grid(path):
        assert study.name.startswith(path.stem)
        # With `auto` the server may take any of them.
        names = [p.name for p in (ROOT / "bundles").glob("seg*")] if study.bundle == AUTO else [study.bundle]
        for name in names:
            bundle = Bundle(ROOT / "bundles" / name)
            bundle.recipe({k: v for k, v in study.train.items() if k not in ("members", "folds", "seed")})
        request = {"unit": study.unit, **({"size": list(study.size)} if study.size else {})}
        for method, _ in study.lines:
            if method.name != "full_data":
                resolve(method.name, {**request, **study.query, **method.options})


def test_published_budgets():
    grid = {s.name: s for s in load_grid(ROOT / "eval" / "studies" / "nnactive.yaml")}
    assert len(grid) == 12
    for name, total in [("acdc_low", 150), ("amos_high", 2500), ("hippocampus_medium", 200), ("kits_low", 200)]:
        study = grid[f"nnactive_{name}"]
        assert study.starting_budget.batch + study.batch * (study.rounds - 1) == total
        assert study.starting_budget.method == "starting_budget"
    sizes = load_grid(ROOT / "eval" / "studies" / "nnactive_query_size.yaml")
    assert len(sizes) == 18
    assert {s.starting_budget.batch + s.batch * (s.rounds - 1) for s in sizes} == {150, 450, 200, 2500}
