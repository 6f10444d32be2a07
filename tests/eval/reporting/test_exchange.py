# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Loop files and nnU-Net datasets: written, read back, and refused ones."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.dataset import read_dataset
from eval.protocol.study import load_study
from eval.runner.replayed_queries import read_loop, replayed
from eval.runner.run import Options, start_run


@pytest.fixture
def run(write_study, stand_in, tmp_path):
    start_run(load_study(write_study(methods=["random"], rounds=2)), tmp_path / "out", Options(quiet=True))
    return tmp_path / "out"


def test_loop_files_turn_axes_and_come_back(run, tmp_path):
    arguments = ["export", str(run), "--method", "random", "--seed", "1", "--nnactive", str(tmp_path / "loops")]
    assert main(arguments) == 0
    asked = pd.read_csv(run / "queries.csv")
    first = json.loads((tmp_path / "loops" / "loop_000.json").read_text())["patches"][0]
    row = asked.iloc[0]
    expected = {"file": f"{row.image}.nii.gz", "coords": [row.z, row.y, row.x], "size": [row.dz, row.dy, row.dx]}
    assert first == expected
    again = read_loop(tmp_path / "loops" / "loop_001.json")
    assert [r["start"] for r in again] == asked[asked["round"] == 1][["x", "y", "z"]].to_numpy().tolist()
    assert replayed(tmp_path / "loops", "any", 1, 1) == again


def test_the_annotated_pool_becomes_an_nnunet_dataset(run, tmp_path, data):
    out = tmp_path / "Dataset001_small"
    assert main(["export", str(run), "--method", "random", "--seed", "1", "--round", "1", "--nnunet", str(out)]) == 0
    card = json.loads((out / "dataset.json").read_text())
    assert card["labels"] == {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}
    asked = pd.read_csv(run / "queries.csv")
    truth = {c.id: np.asarray(nib.load(c.label).dataobj) for c in read_dataset(data).cases}
    assert card["numTraining"] == asked["image"].nunique() == len(list((out / "labelsTr").iterdir()))
    for image, own in asked.groupby("image"):
        label = np.asarray(nib.load(out / "labelsTr" / f"{image}.nii.gz").dataobj)
        seen = np.zeros(label.shape, dtype=bool)
        for q in own.itertuples():
            seen[q.x : q.x + q.dx, q.y : q.y + q.dy, q.z : q.z + q.dz] = True
        np.testing.assert_array_equal(label, np.where(seen, truth[image], 3))
        assert nib.load(out / "imagesTr" / f"{image}_0000.nii.gz").shape == label.shape


def test_what_cannot_be_exchanged_is_refused(run, tmp_path, capsys):
    assert main(["export", str(run), "--method", "bald", "--seed", "1", "--nnactive", str(tmp_path / "x")]) == 2
    assert "no query of bald with seed 1; it has random 1" in capsys.readouterr().err
    assert main(["export", str(run), "--method", "random", "--seed", "1"]) == 2
    (tmp_path / "loop_000.json").write_text('{"patches": [{"file": "a.nii.gz", "size": "whole"}]}')
    with pytest.raises(RefereeError, match="not a loop file of nnActive"):
        read_loop(tmp_path / "loop_000.json")
