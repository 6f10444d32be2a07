# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import shutil
import threading

import nibabel as nib
import numpy as np
import pytest

from eval.__main__ import main
from eval.app_tools import backup as backup_module
from eval.app_tools.audit import audit
from eval.app_tools.backup import backup
from eval.app_tools.project import copy_ledger
from eval.errors import RefereeError
from lib.ledger.journal import Journal
from lib.ledger.queries import QueryLedger
from lib.ledger.store import JOURNAL
from lib.models.checkpoints import ModelStore
from lib.studies.submissions import SubmissionStore
from tests.eval.answered import CLASSES, SHAPE, Studies, write
from tests.lib.models.facts import facts


@pytest.fixture
def studies(tmp_path):
    return Studies(tmp_path / "studies")


def restored(studies, saved):
    """Put a backup beside the images, as on the administrators' page, and open it as a starting server does."""
    folder = saved.parent / "restored"
    folder.mkdir()
    for image in studies.folder.glob("*.nii.gz"):
        shutil.copy2(image, folder)
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    ledger = QueryLedger(folder / ".patchwise" / "ledger.sqlite")
    annotations = SubmissionStore(folder / ".patchwise", folder / "labels" / "final", CLASSES, ledger)
    made = annotations.repair({path.name[: -len(".nii.gz")]: path for path in folder.glob("*.nii.gz")})
    return folder, ledger, made


def test_a_restored_backup_has_every_answer_and_the_same_labels(studies, tmp_path, capsys):
    saved = tmp_path / "saved"
    assert main(["backup", str(studies.folder), str(saved)]) == 0
    assert "3 answers, 0 labels without an answer" in capsys.readouterr().out
    folder, ledger, made = restored(studies, saved)
    assert made == ["a", "b"]
    assert audit(folder).problems == []
    before, after = (
        np.asarray(nib.load(f / "labels" / "final" / "a.nii.gz").dataobj) for f in (studies.folder, folder)
    )
    assert np.array_equal(before, after)
    assert [a.id for a in ledger.answers.of_image("a")] == [a.id for a in studies.ledger.answers.of_image("a")]


def test_answers_may_arrive_meanwhile(studies, tmp_path):
    stop, saved, errors = threading.Event(), [], []

    def annotate():
        label = np.zeros(SHAPE)
        while not stop.is_set():
            label[np.unravel_index(len(saved) % label.size, SHAPE)] = 1
            try:
                saved.append(studies.save("a", label, whole=True))
            except Exception as error:
                errors.append(error)
                return

    annotator = threading.Thread(target=annotate)
    annotator.start()
    try:
        counts = []
        for number in range(5):
            before = len(saved)
            found = backup(studies.folder, tmp_path / f"saved_{number}")
            counts.append((before + 3, found.answers, len(saved) + 4))  # one more may be recorded and not yet counted
    finally:
        stop.set()
        annotator.join()
    assert errors == []
    assert counts[-1][1] > 3
    for at_least, answers, at_most in counts:
        assert at_least <= answers <= at_most
    folder, ledger, _ = restored(studies, tmp_path / "saved_4")
    assert audit(folder).problems == []
    assert len(ledger.answers.of_image("a", withdrawn=True)) + 1 == counts[-1][1]


def test_an_answer_right_after_the_copy_of_the_ledger_is_in_neither_record(studies, tmp_path, monkeypatch):
    def copied_then_answered(source, target):
        copy_ledger(source, target)
        studies.save("a", np.ones(SHAPE), whole=True)

    monkeypatch.setattr(backup_module, "copy_ledger", copied_then_answered)
    assert backup(studies.folder, tmp_path / "saved").answers == 3
    folder, ledger, _ = restored(studies, tmp_path / "saved")
    assert audit(folder).problems == []
    known = {answer.raw for image in ("a", "b") for answer in ledger.answers.of_image(image, withdrawn=True)}
    assert {e["answer"]["raw"] for e in Journal(folder / ".patchwise" / JOURNAL).entries() if "answer" in e} == known


def test_labels_that_nobody_answered_for_and_the_current_model_are_kept(studies, tmp_path):
    write(studies.label.with_name("c.nii.gz"), np.ones(SHAPE))
    store = ModelStore(studies.folder / ".patchwise" / "models", "net")
    for digest in ("0" * 64, "1" * 64):
        store.save_member(digest, 0, {})
        store.publish(facts(digest, round=1))
    (studies.folder / ".patchwise" / "moments").mkdir()
    saved = tmp_path / "saved"
    assert backup(studies.folder, saved).labels == 1
    assert [p.name for p in (saved / "labels" / "final").iterdir()] == ["c.nii.gz"]
    kept = ModelStore(saved / ".patchwise" / "models", "net").current()
    assert (kept.digest, kept.facts) == ("1" * 64, store.current().facts)
    assert sorted(p.name for p in kept.folder.parent.iterdir()) == ["1" * 16, "current.json"]
    assert kept.folder.joinpath("member_0.pt").read_bytes() == store.member_path("1" * 64, 0).read_bytes()
    assert not (saved / ".patchwise" / "moments").exists()


def test_a_damaged_raw_file_is_named_and_nothing_is_left(studies, tmp_path):
    studies.raw(studies.answers[0]).write_bytes(b"changed")
    with pytest.raises(RefereeError, match="answer 1, differs from the submission"):
        backup(studies.folder, tmp_path / "saved")
    studies.raw(studies.answers[0]).unlink()
    with pytest.raises(RefereeError, match="answer 1, is missing"):
        backup(studies.folder, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["studies", "upload"]


def test_a_folder_that_exists_and_one_without_a_ledger_are_refused(studies, tmp_path, capsys):
    assert main(["backup", str(studies.folder), str(tmp_path)]) == 2
    assert "exists; a backup is never written over something" in capsys.readouterr().err
    assert main(["backup", str(tmp_path), str(tmp_path / "saved")]) == 2
    assert "no .patchwise/ledger.sqlite there" in capsys.readouterr().err
