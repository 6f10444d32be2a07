# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
import sqlite3

import nibabel as nib
import numpy as np
import pytest

from eval.__main__ import main
from eval.app_tools.audit import audit
from eval.errors import RefereeError
from tests.eval.answered import SHAPE, Studies, geometry, write


@pytest.fixture
def studies(tmp_path):
    return Studies(tmp_path / "studies")


def problems(studies):
    return {row["file"].rsplit("/", 1)[-1]: row["problem"] for row in audit(studies.folder).problems}


def test_labels_that_equal_their_rebuild_pass_and_nothing_is_changed(studies, capsys):
    before = {p: p.read_bytes() for p in studies.folder.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert main(["audit", str(studies.folder)]) == 0
    assert capsys.readouterr().out.endswith(
        "2 labels from 3 answers (0 withdrawn): all equal the rebuild from the raw answers\n"
    )
    after = {p: p.read_bytes() for p in studies.folder.rglob("*") if p.is_file() and "sqlite" not in p.name}
    assert before == after


def test_the_second_reading_wins_and_its_agreement_is_recorded(studies):
    (pair,) = studies.ledger.answers.agreements()
    # 18 voxels by one person, 9 by the other, 9 shared.
    assert pair["classes"]["anterior"] == {"dice": pytest.approx(2 * 9 / 27), "voxels": [18, 9]}
    assert pair["classes"]["posterior"]["dice"] is None
    label = np.asarray(nib.load(studies.label).dataobj)
    assert (int((label == 1).sum()), int((label == 0).sum())) == (9, 18)


def test_a_changed_label_is_named_with_exit_code_2(studies, capsys):
    label = np.asarray(nib.load(studies.label).dataobj).copy()
    label[0, 0, 0] = 2
    write(studies.label, label)
    assert main(["audit", str(studies.folder), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [
        {"file": str(studies.label), "problem": "1 voxels differ from the rebuild from the raw answers"}
    ]


def test_missing_changed_and_stray_files_are_named(studies):
    raw = studies.raw(studies.answers[0])
    kept = raw.read_bytes()
    raw.write_bytes(b"changed")
    stray = write(studies.label.with_name("c.nii.gz"), np.zeros(SHAPE))
    assert "differs from the submission" in problems(studies)[raw.name]
    assert "cannot be compared" in problems(studies)["a.nii.gz"]
    assert "no recorded answer" in problems(studies)[stray.name]
    raw.unlink()
    assert "is missing" in problems(studies)[raw.name]
    raw.write_bytes(kept)
    stray.unlink()
    assert problems(studies) == {}
    studies.label.unlink()
    assert "label is missing" in problems(studies)["a.nii.gz"]
    (studies.folder / "b.nii.gz").unlink()
    assert "image of recorded answers is missing" in problems(studies)["b.nii.gz"]


def test_a_changed_class_wise_label_is_named(studies):
    path = studies.label.with_name("b.nii.gz")
    label = np.asarray(nib.load(path).dataobj).copy()
    label[label == 255] = 0
    write(path, label)
    assert "voxels differ" in problems(studies)["b.nii.gz"]


def test_a_raw_file_of_nobody_is_a_note(studies):
    studies.raw(studies.answers[0]).with_name("left.nii.gz").write_bytes(b"half a submission")
    found = audit(studies.folder)
    assert (found.problems, found.unreferenced) == ([], ["a/left.nii.gz"])


def test_withdrawals_rebuild_the_label_and_pass(studies):
    first, second = studies.answers
    both = studies.label.read_bytes()
    studies.annotations.withdraw(second, geometry, "ann")
    assert int((np.asarray(nib.load(studies.label).dataobj) == 1).sum()) == 18
    studies.annotations.withdraw(first, geometry, "ann")
    assert not studies.label.exists()
    assert problems(studies) == {}
    assert audit(studies.folder).withdrawn == 2
    write(studies.label, np.zeros(SHAPE))
    assert "withdrawn" in problems(studies)["a.nii.gz"]
    studies.annotations.restore(first, geometry, "ann")
    studies.annotations.restore(second, geometry, "ann")
    assert np.array_equal(
        np.asarray(nib.load(studies.label).dataobj), np.asarray(nib.Nifti1Image.from_bytes(_unzip(both)).dataobj)
    )
    assert problems(studies) == {}


def _unzip(content):
    import gzip

    return gzip.decompress(content)


def test_a_withdrawal_that_could_not_be_rebuilt_changes_nothing(studies):
    from lib.storage.volumes import ImageError

    first, second = studies.answers
    raw = studies.raw(first)
    raw.rename(raw.with_name("elsewhere.nii.gz"))
    with pytest.raises(ImageError, match="missing or changed"):
        studies.annotations.withdraw(second, geometry, "ann")
    assert studies.ledger.answers.get(second).active


def test_a_withdrawal_that_was_killed_before_the_rebuild_is_repaired(studies):
    studies.ledger.answers.withdraw(studies.answers[1], "ann")
    assert "voxels differ" in problems(studies)["a.nii.gz"]
    assert studies.annotations.repair({"a": studies.folder / "a.nii.gz"}) == ["a"]
    assert problems(studies) == {}
    studies.label.unlink()
    assert studies.annotations.repair({"a": studies.folder / "a.nii.gz"}) == ["a"]
    assert problems(studies) == {}


def test_what_was_found_right_is_rebuilt_only_when_something_changed(studies, monkeypatch):
    from lib.studies.submissions import SubmissionStore

    rebuilt, plain = [], SubmissionStore.rebuilt
    monkeypatch.setattr(
        SubmissionStore, "rebuilt", lambda self, image, shape: rebuilt.append(image) or plain(self, image, shape)
    )
    verified = {}

    def look():
        rebuilt.clear()
        return [row["problem"] for row in audit(studies.folder, verified).problems], sorted(rebuilt)

    assert look() == ([], ["a", "b"])
    assert look() == ([], [])
    studies.annotations.withdraw(studies.answers[1], geometry, "ann")
    assert look() == ([], ["a"])
    kept = studies.label.read_bytes()
    write(studies.label, np.zeros(SHAPE))
    for _ in range(2):  # what is wrong stays wrong
        (problem,), looked_at = look()
        assert "voxels differ" in problem
        assert looked_at == ["a"]
    studies.label.write_bytes(kept)
    assert look() == ([], [])
    studies.raw(studies.answers[0]).write_bytes(b"changed")
    (problem,), _ = look()
    assert "differs from the submission" in problem


def test_a_folder_without_a_ledger_is_refused(tmp_path, capsys):
    with pytest.raises(RefereeError, match="name the studies folder"):
        audit(tmp_path)
    assert main(["audit", str(tmp_path)]) == 2
    assert "ledger" in capsys.readouterr().err


def test_an_answer_that_the_ledger_has_lost_is_found(studies):
    raw = studies.ledger.answers.get(studies.answers[1]).raw
    with sqlite3.connect(studies.ledger.path) as ledger:
        ledger.execute("DELETE FROM answered WHERE answer = ?", (studies.answers[1],))
        ledger.execute("DELETE FROM answers WHERE id = ?", (studies.answers[1],))
    problems = {row["problem"] for row in audit(studies.folder).problems}
    number = studies.answers[1]
    assert f"answer {number} ({raw}) is not in the ledger; a start of the server records it again" in problems
