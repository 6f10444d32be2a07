# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A study in parts: which cells run, and parts joined give the numbers of the whole."""

import json
import shutil

import pandas as pd
import pytest

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.cell_filter import filtered_cells
from eval.protocol.study import load_study
from eval.records.merge import merge_parts
from eval.runner.grid import calibrated, forecast
from eval.runner.run import Options, resume_run, start_run
from tests.eval.runner.test_run import numbers


def quiet(only=None):
    return Options(quiet=True, only=only)


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_filters_by_hand(write_study):
    study = load_study(write_study(seeds=[1, 2], full_data=True))
    assert filtered_cells("seed=1,method=power_pe", study) == {"power_pe_s1"}
    assert filtered_cells("seed=1, seed=2,method=random", study) == {"random_s1", "random_s2"}
    assert filtered_cells("seed=2", study) == {"random_s2", "power_pe_s2", "full_data_s2"}
    for wrong, sentence in [
        ("seed=3", "seed 3, but small has 1, 2"),
        ("method=rand", "method rand, but small has random"),
        ("round=1", "method=NAME and seed=NUMBER"),
        ("seed", "found 'seed'"),
    ]:
        with pytest.raises(RefereeError, match=sentence):
            filtered_cells(wrong, study)


@pytest.fixture
def parts(write_study, stand_in, tmp_path, monkeypatch):
    """Two parts, the first of which was stopped and resumed, and the whole study in one go."""
    path = write_study(seeds=[1, 2], rounds=2)
    study = load_study(path)
    start_run(study, tmp_path / "whole", quiet())
    stand_in.calls.clear()
    monkeypatch.setattr(stand_in, "fail_on", "train 3")
    with pytest.raises(RefereeError, match="refuses"):
        start_run(study, tmp_path / "one", quiet("seed=1"))
    monkeypatch.setattr(stand_in, "fail_on", None)
    resume_run(tmp_path / "one", quiet())
    start_run(study, tmp_path / "two", quiet("seed=2"))
    return path, tmp_path


def test_parts_joined_are_the_whole(parts, capsys):
    _, folder = parts
    assert {p.name for p in (folder / "one" / "cells").iterdir()} == {"random_s1", "power_pe_s1"}
    joined, one, two = folder / "joined", folder / "one", folder / "two"
    assert main(["merge", str(two), str(one), "--out", str(joined)]) == 0
    assert "4 of 4 cells" in capsys.readouterr().out
    for name, table in numbers(folder / "whole").items():
        pd.testing.assert_frame_equal(table, numbers(joined)[name])
    manifest = json.loads((joined / "manifest.json").read_text())
    assert manifest["finished"] is not None
    assert "only" not in manifest
    assert [p["folder"] for p in manifest["parts"]] == ["two", "one"]
    assert (joined / "report.html").is_file()
    resume_run(joined, quiet())  # nothing is left to do
    with pytest.raises(RefereeError, match="is not empty"):
        merge_parts([one], joined)


def test_an_unfinished_cell_stays_behind(parts):
    _, folder = parts
    state = folder / "two" / "cells" / "random_s2" / "state.json"
    content = json.loads(state.read_text())
    del content["steps"]["1.test"]
    state.write_text(json.dumps(content))
    assert merge_parts([folder / "one", folder / "two"], folder / "joined") == (3, 4)
    assert json.loads((folder / "joined" / "manifest.json").read_text())["finished"] is None


def test_parts_that_do_not_belong_together_are_refused(parts, write_study, stand_in):
    _, folder = parts
    one, two = folder / "one", folder / "two"
    manifest = json.loads((two / "manifest.json").read_text())

    def refuse(sentence, *, mixed=False):
        with pytest.raises(RefereeError, match=sentence):
            merge_parts([one, two], folder / "joined", mixed=mixed)
        assert not (folder / "joined").exists()

    change(two / "manifest.json", versions={**manifest["versions"], "code": "other"})
    refuse("different project")
    assert merge_parts([one, two], folder / "mixed", mixed=True) == (4, 4)
    assert json.loads((folder / "mixed" / "manifest.json").read_text())["mixed"][0]["versions"]["code"] == "other"
    change(two / "manifest.json", hardware={**manifest["hardware"], "cpu": "other"}, versions=manifest["versions"])
    refuse("different hardware")
    change(two / "manifest.json", **{**manifest, "data": {**manifest["data"], "digest": "other"}})
    refuse("different data")
    change(two / "manifest.json", **manifest)
    shutil.copytree(one / "cells" / "random_s1", two / "cells" / "random_s1")
    assert merge_parts([one, two], folder / "twice") == (4, 4)  # the same results twice
    change(
        two / "cells" / "random_s1" / "state.json",
        steps={**json.loads((two / "cells" / "random_s1" / "state.json").read_text())["steps"], "x": 1},
    )
    refuse("both finished random_s1")
    shutil.rmtree(two)
    refuse("so no run to merge")
    start_run(load_study(write_study(seeds=[1, 2], rounds=2, batch=3)), two, quiet("seed=2"))
    refuse("ran different studies", mixed=True)


def test_forecast_of_a_part_and_from_a_run(parts, write_study, capsys):
    path, folder = parts
    assert main(["run", str(path), "--dry-run", "--only", "seed=1", "--calibrate", str(folder / "whole")]) == 0
    shown = capsys.readouterr().out
    assert "random seed 1" in shown
    assert "seed 2" not in shown
    study = load_study(path)
    rounds = pd.read_csv(folder / "whole" / "rounds.csv")
    measured = calibrated(study, folder / "whole")
    assert measured.expected.step_seconds == pytest.approx(rounds["train_s"].mean() / (2 * 3))
    assert measured.expected.case_seconds == pytest.approx(rounds["test_s"].mean() / (2 * 2))
    assert forecast(study, {"random_s1"})["cells"] == 1
    # Two methods of two seeds: as much as four such cells, but for two trainings of round 0 that are shared.
    training = 2 * 3 * study.expected.step_seconds * 1.2 / 3600
    assert forecast(study)["hours"] == pytest.approx(4 * forecast(study, {"random_s1"})["hours"] - 2 * training)
    other = load_study(write_study(train={"members": 2, "patch": [8, 8, 8]}))
    with pytest.raises(RefereeError, match="calibrate with its like"):
        calibrated(other, folder / "whole")
