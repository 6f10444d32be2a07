# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Reports and exports that name no patient, user, path or host: every file that comes out is searched."""

import getpass
import gzip
import json
import platform

import nibabel as nib
import pandas as pd
import pytest

from eval.__main__ import main
from eval.errors import RefereeError
from eval.protocol.study import load_study
from eval.reporting.deidentify import Hidden, check_without_ids, hidden_of, pseudonyms
from eval.runner.run import Options, start_run


@pytest.fixture
def patients(data):
    """The dataset with names of patients, one a prefix of another, that are also in the headers."""
    for kind in ("imagesTr", "labelsTr"):
        for number, path in enumerate(sorted((data / kind).glob("*.nii.gz"))):
            image = nib.load(path)
            image.header["descrip"] = b"Jane Doe"
            nib.save(image, path.with_name(f"doe_jane{'_x' * number}.nii.gz"))
            path.unlink()
    card = json.loads((data / "dataset.json").read_text())
    card.pop("training", None)
    (data / "dataset.json").write_text(json.dumps(card))
    return [path.name.removesuffix(".nii.gz") for path in sorted((data / "labelsTr").iterdir())]


@pytest.fixture
def run(patients, write_study, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "ward-7-server")
    about = f"scans of doe_jane_x and others, from {tmp_path / 'data'} of ward-7-server"
    start_run(load_study(write_study(rounds=2, about=about)), tmp_path / "out", Options(quiet=True))
    for path in (tmp_path / "out").glob("cells/*/state.json"):
        state = json.loads(path.read_text())
        for region in state["steps"]["1.query"]["regions"]:
            region["reason"] = {"rank": 1, "runner_up": {"image": patients[0], "score": 0.5}}
        path.write_text(json.dumps(state))
    return tmp_path / "out"


def test_no_file_of_the_report_says_who_or_where(run, patients, tmp_path, capsys):
    assert main(["report", str(run), "--deidentify"]) == 0
    out = run / "deidentified"
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files >= {"report.html", "learning_curves.png", "rounds.csv", "cases.csv", "queries.csv", "manifest.json"}
    for name in files:
        content = (out / name).read_bytes() + name.encode()
        for word in (*patients, str(tmp_path), "ward-7", "Jane"):
            assert word.encode() not in content, (name, word)
    assert not (run / "report.html").exists()


def test_tables_say_the_same_under_other_names(run, patients):
    assert main(["report", str(run), "--deidentify", "--no-pictures"]) == 0
    names = {image: f"case_{number:03d}" for number, image in enumerate(patients, start=1)}
    for table, column in (("cases", "case"), ("queries", "image")):
        expected = pd.read_csv(run / f"{table}.csv").replace({column: names})
        pd.testing.assert_frame_equal(pd.read_csv(run / "deidentified" / f"{table}.csv"), expected)
    html = (run / "deidentified" / "report.html").read_text()
    assert "scans of case_002 and others, from [hidden] of [hidden]" in html
    assert "next best case_001 with 0.500" in html
    manifest = json.loads((run / "deidentified" / "manifest.json").read_text())
    kept = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["pool"] == {k: v for k, v in kept["data"]["pool"].items() if k != "images"}
    assert manifest["versions"] == kept["versions"]
    assert "command" not in manifest


def test_an_id_in_a_place_that_nobody_thought_of_stops_the_report(run, patients, monkeypatch, capsys):
    monkeypatch.setattr("eval.reporting.report.summarise", lambda rounds: pd.DataFrame([{"method": patients[-1]}]))
    monkeypatch.setattr("eval.reporting.report._summary_rows", lambda rounds: [])
    assert main(["report", str(run), "--deidentify", "--no-pictures"]) == 2
    assert f"would still have said '{patients[-1]}'; nothing was written" in capsys.readouterr().err
    assert not (run / "deidentified").exists()


def test_exports_carry_pseudonyms_and_plain_headers(run, patients, tmp_path):
    arguments = ["export", str(run), "--method", "random", "--seed", "1", "--deidentify"]
    loops, dataset = tmp_path / "loops", tmp_path / "dataset"
    assert main([*arguments, "--nnactive", str(loops), "--nnunet", str(dataset)]) == 0
    asked = pd.read_csv(run / "queries.csv")
    names = pseudonyms(patients)
    patch = json.loads((loops / "loop_000.json").read_text())["patches"][0]
    assert patch["file"] == f"{names[asked.iloc[0].image]}.nii.gz"
    for image in asked["image"].unique():
        written = nib.load(dataset / "imagesTr" / f"{names[image]}_0000.nii.gz")
        stored = nib.load(tmp_path / "data" / "imagesTr" / f"{image}.nii.gz")
        assert (written.get_fdata() == stored.get_fdata()).all()
        assert (written.affine == stored.affine).all()
    for path in (path for folder in (loops, dataset) for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert not any(word.encode() in content for word in (*patients, "Jane Doe")), path
        assert not any(word in path.name for word in patients)


def test_pseudonyms_count_in_order_and_avoid_the_ids_own_word():
    assert pseudonyms(["b", "a", "b"]) == {"a": "case_001", "b": "case_002"}
    assert pseudonyms(["Case_002", "scan"]) == {"Case_002": "image_001", "scan": "image_002"}
    assert pseudonyms(["case", "scan", "image", "volume"])["case"] == "pseudonym_001"
    assert pseudonyms(f"{number:04d}" for number in range(1000))["0000"] == "case_0001"


def test_texts_lose_whole_words_only_the_longest_first():
    hidden = Hidden({"doe": "case_001", "patient_1": "case_002", "patient_12": "case_003"}, ("/data/ward 3",))
    assert hidden.text("patient_12, patient_1. patient_123 on /data/ward 3/x") == (
        "case_003, case_002. patient_123 on [hidden]/x"
    )
    # Three letters stand in many words; where tables name images they are replaced all the same.
    assert hidden.text("doe") == "doe"
    assert hidden.name("doe") == "case_001"
    with pytest.raises(RefereeError, match="image bob is in no table"):
        hidden.name("bob")
    assert Hidden({}).text("anything") == "anything"


def test_files_are_searched_with_their_names_and_without_pictures(tmp_path):
    hidden = Hidden({"patient_1": "case_001"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "page.html").write_text('<img src="data:image/png;base64,AAAA/patient_1">'.replace("_", "+"))
    check_without_ids(tmp_path / "out", hidden)
    (tmp_path / "out" / "patient_1.png").write_bytes(b"")
    with pytest.raises(RefereeError, match=r"patient_1.png would still have said 'patient_1'"):
        check_without_ids(tmp_path / "out", hidden)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RefereeError, match="no run to report"):
        hidden_of(tmp_path)


def test_users_without_a_name_hide_nothing(run, monkeypatch):
    def nobody():
        raise KeyError("no such user")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert "" not in hidden_of(run).places
