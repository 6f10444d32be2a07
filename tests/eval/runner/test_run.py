# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Whole runs against the stand-in server: tables, resuming, guards, and bad input as one sentence."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.dataset import read_dataset
from eval.protocol.study import load_study
from eval.runner.cell import CancelledError, Cell, Material
from eval.runner.grid import plan
from eval.runner.run import Options, resume_run, start_run
from tests.eval.conftest import ROOT

QUIET = Options(quiet=True)
TIMES = ["train_s", "score_s", "query_s", "test_s", "annotate_s"]


def numbers(out):
    return {
        name: pd.read_csv(out / f"{name}.csv").drop(columns=TIMES, errors="ignore")
        for name in ("rounds", "cases", "queries")
    }


def test_run_writes_the_folder_of_the_design(write_study, stand_in, tmp_path, data):
    out = tmp_path / "out"
    start_run(load_study(write_study()), out, QUIET)
    tables = numbers(out)
    rounds = tables["rounds"]
    assert list(pd.read_csv(out / "rounds.csv").columns) == [
        "method",
        "seed",
        "round",
        "regions",
        "voxels",
        "foreground_voxels",
        "foreground_fraction",
        "mean_dice",
        "dice_anterior",
        "dice_posterior",
        "mean_hd95",
        "foreground_slices",
        "border_mm",
        "minutes",
        "score_s",
        "query_s",
        "annotate_s",
        "train_s",
        "test_s",
    ]
    assert rounds["regions"].tolist() == [3, 5, 7, 3, 5, 7]
    assert rounds["voxels"].tolist() == [12**3 * n for n in (3, 5, 7, 3, 5, 7)]
    # Foreground by counting again from the ground truth.
    dataset = read_dataset(data)
    labels = {c.id: np.asarray(nib.load(c.label).dataobj) for c in dataset.cases}
    queries = tables["queries"]
    cuts = [labels[q.image][q.x : q.x + q.dx, q.y : q.y + q.dy, q.z : q.z + q.dz] for q in queries.itertuples()]
    assert queries["foreground_voxels"].tolist() == [int((cut > 0).sum()) for cut in cuts]
    assert queries["voxels_anterior"].tolist() == [int((cut == 1).sum()) for cut in cuts]
    manifest = json.loads((out / "manifest.json").read_text())
    pool = manifest["data"]["pool"]["images"]
    total = sum(int((labels[i] > 0).sum()) for i in pool)
    own = queries[queries.method == "random"]
    first = cuts[0]
    assert queries["foreground_slices"][0] == (first > 0).any(axis=(0, 1)).sum()
    assert rounds["minutes"][2] == pytest.approx(own["minutes"].sum())
    assert rounds["border_mm"][0] == pytest.approx(own[own["round"] == 0]["border_mm"].sum())
    assert rounds["foreground_fraction"][2] == pytest.approx(own["foreground_voxels"].sum() / total)
    cases = tables["cases"]
    last = cases[(cases.method == "power_pe") & (cases["round"] == 2)]
    assert rounds["mean_dice"].iloc[-1] == pytest.approx(last.groupby("class")["dice"].mean().mean())
    assert set(cases["case"]) == set(manifest["data"]["test"]["images"])
    assert not set(cases["case"]) & set(pool)
    assert manifest["finished"] is not None
    start = queries[queries["round"] == 0].drop(columns=["method", "query"])
    assert start.iloc[:3].reset_index(drop=True).equals(start.iloc[3:].reset_index(drop=True))


def test_only_methods_with_a_posterior_are_scored(write_study, stand_in, tmp_path):
    start_run(load_study(write_study()), tmp_path / "out", QUIET)
    assert stand_in.calls.count("score") == 2  # power_pe, rounds 1 and 2


def test_answers_hold_ground_truth_inside_the_regions_only(write_study, stand_in, tmp_path, data, monkeypatch):
    servers = []
    start = stand_in.start
    monkeypatch.setattr(stand_in, "start", lambda self, seconds=10: (servers.append(self), start(self))[1])
    start_run(load_study(write_study(methods=["random"], rounds=1)), tmp_path / "out", QUIET)
    queries = numbers(tmp_path / "out")["queries"]
    truth = {c.id: np.asarray(nib.load(c.label).dataobj) for c in read_dataset(data).cases}
    for q in queries.itertuples():
        sent_xyz, params = servers[0].saved[q.query]
        box = (slice(q.x, q.x + q.dx), slice(q.y, q.y + q.dy), slice(q.z, q.z + q.dz))
        np.testing.assert_array_equal(sent_xyz[box], truth[q.image][box])
        outside = np.ones(sent_xyz.shape, dtype=bool)
        for other in queries[queries.image == q.image].itertuples():
            outside[other.x : other.x + 12, other.y : other.y + 12, other.z : other.z + 12] = False
        assert not sent_xyz[outside].any()
        assert params["label_info"] == [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
        assert params["client_id"] == "oracle"


def test_ground_truth_never_reaches_the_server(write_study, stand_in, tmp_path):
    start_run(load_study(write_study()), tmp_path / "out", QUIET)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for folder in (tmp_path / "out" / "cells").iterdir():
        images = {p.name.removesuffix(".nii.gz") for p in (folder / "studies").glob("*.nii.gz")}
        assert images == set(manifest["data"]["pool"]["images"])
        assert not (folder / "studies" / "labels").exists()


@pytest.mark.parametrize(
    "broken",
    [
        *("save 3", "train 2"),
        *(pytest.param(step, marks=pytest.mark.slow) for step in ("query 2", "infer 4", "score 1", "session 2")),
    ],
)
def test_resume_gives_the_numbers_of_an_uninterrupted_run(write_study, stand_in, tmp_path, monkeypatch, broken):
    study = load_study(write_study())
    start_run(study, tmp_path / "whole", QUIET)
    stand_in.calls.clear()
    monkeypatch.setattr(stand_in, "fail_on", broken)
    with pytest.raises(RefereeError, match="the stand-in refuses"):
        start_run(study, tmp_path / "broken", QUIET)
    monkeypatch.setattr(stand_in, "fail_on", None)
    resume_run(tmp_path / "broken", QUIET)
    whole, broken_run = numbers(tmp_path / "whole"), numbers(tmp_path / "broken")
    for name, table in whole.items():
        pd.testing.assert_frame_equal(table, broken_run[name])
    stand_in.calls.clear()
    resume_run(tmp_path / "broken", QUIET)
    assert stand_in.calls == []  # nothing left to do


def test_two_workers_give_the_same_numbers(write_study, stand_in, tmp_path):
    study = load_study(write_study(seeds=[1, 2]))
    start_run(study, tmp_path / "one", QUIET)
    start_run(study, tmp_path / "two", Options(workers=2, quiet=True))
    for name, table in numbers(tmp_path / "one").items():
        pd.testing.assert_frame_equal(table, numbers(tmp_path / "two")[name])


def empty_material(study):
    return Material(study, read_dataset(study.data), [], [], 1)


def test_a_cancelled_cell_stops_between_requests(write_study, stand_in, tmp_path):
    study = load_study(write_study(methods=["random"]))
    start_run(study, tmp_path / "out", QUIET)
    stop = threading.Event()
    stop.set()
    cell = Cell(empty_material(study), study.methods[0], 9, tmp_path / "cell", stop=stop)
    with pytest.raises(CancelledError):
        cell._round(None, 0)
    assert not cell.finished


def test_run_uses_a_running_server(write_study, stand_in, tmp_path, data):
    from eval.protocol.study import split_cases

    study = load_study(write_study(methods=["random"], rounds=2))
    pool, test = split_cases(study, read_dataset(data))
    studies = tmp_path / "served"
    studies.mkdir()
    for case in pool:
        shutil.copy(case.image, studies)
    server = stand_in(studies, {}, log=studies / "log", threads=1)
    server.start()
    try:
        start_run(study, tmp_path / "out", Options(url=server.url, quiet=True))
        assert numbers(tmp_path / "out")["rounds"]["regions"].tolist() == [3, 5]
        shutil.copy(test[0].image, studies / "renamed.nii.gz")
        with pytest.raises(RefereeError, match=f"image renamed is test case {test[0].id}"):
            start_run(study, tmp_path / "leaky", Options(url=server.url, quiet=True))
        (studies / "renamed.nii.gz").unlink()
        (studies / pool[0].image.name).unlink()
        with pytest.raises(RefereeError, match=f"does not hold pool image {pool[0].id}"):
            start_run(study, tmp_path / "again", Options(url=server.url, quiet=True))
    finally:
        server.stop()


def test_plan_lists_every_cell(write_study):
    lines = plan(load_study(write_study(seeds=[1, 2])))
    assert len(lines) == 4
    assert lines[0] == "random seed 1: 3 rounds, 7 regions (3 + 2 + 2)"


# --- bad input: exit code 2, one sentence, nothing left behind ----------------------------------------------------


def refused(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message
    assert "Traceback" not in message
    assert "\n" not in message
    return message


def run_refused(capsys, tmp_path, study) -> str:
    message = refused(capsys, "run", study, "--out", tmp_path / "out", "--quiet")
    left = [p.name for p in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert left in ([], [".lock"])
    return message


def test_missing_data_folder(capsys, tmp_path, write_study):
    message = run_refused(capsys, tmp_path, write_study(data="nowhere"))
    assert "nowhere does not exist" in message


def test_missing_study(capsys, tmp_path):
    assert "does not exist" in run_refused(capsys, tmp_path, tmp_path / "no.yaml")


def test_truncated_image(capsys, tmp_path, write_study, data):
    victim = data / "imagesTr" / "hippocampus_003.nii.gz"
    victim.write_bytes(victim.read_bytes()[:2000])
    message = run_refused(capsys, tmp_path, write_study())
    assert "hippocampus_003.nii.gz cannot be read as NIfTI" in message


def test_corrupt_label(capsys, tmp_path, write_study, data):
    (data / "labelsTr" / "hippocampus_002.nii.gz").write_bytes(b"not a scan at all")
    message = run_refused(capsys, tmp_path, write_study())
    assert "labelsTr/hippocampus_002.nii.gz cannot be read as NIfTI" in message


def resave(path, change=lambda a: a, affine=lambda m: m):
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(volume.dataobj)), affine(volume.affine)), path)


def test_label_of_another_shape(capsys, tmp_path, write_study, data):
    resave(data / "labelsTr" / "hippocampus_001.nii.gz", lambda a: a[:-1])
    assert "both must lie on one grid" in run_refused(capsys, tmp_path, write_study())


def test_label_of_another_affine(capsys, tmp_path, write_study, data):
    resave(data / "labelsTr" / "hippocampus_001.nii.gz", affine=lambda m: m + np.eye(4)[:, [3, 0, 1, 2]])
    assert "another affine" in run_refused(capsys, tmp_path, write_study())


def test_unknown_class_value(capsys, tmp_path, write_study, data):
    resave(data / "labelsTr" / "hippocampus_004.nii.gz", lambda a: np.where(a == 2, 7, a).astype(np.uint8))
    message = run_refused(capsys, tmp_path, write_study())
    assert "hippocampus_004.nii.gz holds label value 7" in message
    assert "1 anterior, 2 posterior" in message


def test_nan_in_an_image(capsys, tmp_path, write_study, data):
    path = data / "imagesTr" / "hippocampus_005.nii.gz"
    resave(path, lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32))
    assert "NaN or infinite" in run_refused(capsys, tmp_path, write_study())


def test_case_in_pool_and_test_by_name(capsys, tmp_path, write_study):
    names = [f"hippocampus_00{i}" for i in range(1, 7)]
    message = run_refused(capsys, tmp_path, write_study(split={"test": names[:2], "pool": names[1:]}))
    assert "hippocampus_002 is in the pool and in the test set" in message


def test_case_in_pool_and_test_under_another_name(capsys, tmp_path, write_study, data):
    for kind in ("imagesTr", "labelsTr"):
        content = (data / kind / "hippocampus_001.nii.gz").read_bytes()
        # Another compression: other bytes on disk, the same scan.
        again = gzip.compress(gzip.decompress(content), compresslevel=1)
        (data / kind / "hippocampus_006.nii.gz").write_bytes(again)
    study = write_study(split={"test": ["hippocampus_006"]})
    message = run_refused(capsys, tmp_path, study)
    assert "hippocampus_006 and pool case hippocampus_001 hold the same image" in message


def test_unknown_test_case(capsys, tmp_path, write_study):
    message = run_refused(capsys, tmp_path, write_study(split={"test": ["hippocampus_0001"]}))
    assert "did you mean hippocampus_001?" in message


def test_unknown_entry(capsys, tmp_path, write_study):
    assert "did you mean methods?" in run_refused(capsys, tmp_path, write_study(method=["random"]))


def test_missing_entry(capsys, tmp_path, write_study):
    assert "seeds is missing" in run_refused(capsys, tmp_path, write_study(seeds=None))


def test_without_a_bundle_a_study_takes_the_one_that_the_server_chose(capsys, tmp_path, write_study, stand_in):
    assert main(["run", str(write_study(bundle=None)), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert stand_in.calls.count("train") == 6


def test_patch_without_size(capsys, tmp_path, write_study):
    assert "unit patch needs size" in run_refused(capsys, tmp_path, write_study(size=None))


def test_empty_pool(capsys, tmp_path, write_study, data):
    names = [c.id for c in read_dataset(data).cases]
    assert "the pool of the study is empty" in run_refused(capsys, tmp_path, write_study(split={"test": names}))


def test_dataset_without_labels(capsys, tmp_path, write_study, data):
    shutil.rmtree(data / "labelsTr")
    assert "labelsTr" in run_refused(capsys, tmp_path, write_study())


def test_folder_in_use(capsys, tmp_path, write_study):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "is not empty" in refused(capsys, "run", write_study(), "--out", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_unknown_bundle(capsys, tmp_path, write_study, stand_in):
    message = refused(capsys, "run", write_study(bundle="other"), "--out", tmp_path / "out", "--quiet")
    assert "has no bundle other; it offers net" in message


def test_resume_without_a_run(capsys, tmp_path):
    assert "no run to resume" in refused(capsys, "resume", tmp_path)


def test_resume_with_changed_data(capsys, tmp_path, write_study, stand_in, data, monkeypatch):
    monkeypatch.setattr(stand_in, "fail_on", "train 2")
    refused(capsys, "run", write_study(), "--out", tmp_path / "out", "--quiet")
    resave(data / "labelsTr" / "hippocampus_001.nii.gz", lambda a: np.zeros_like(a))
    assert "changed since" in refused(capsys, "resume", tmp_path / "out", "--quiet")


def test_report_without_a_round(capsys, tmp_path):
    assert "no finished round yet" in refused(capsys, "report", tmp_path)


def test_commands_never_show_a_traceback(tmp_path):
    command = [sys.executable, "-m", "eval", "run", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
