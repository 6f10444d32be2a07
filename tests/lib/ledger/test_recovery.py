# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A ledger that comes back shorter than it was: answers, their withdrawals and numbers of queries are known again."""

from __future__ import annotations

import shutil
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.ledger.store import LedgerError, damaged
from lib.regions import Region
from lib.studies.submissions import SubmissionStore
from tests.eval.answered import CLASSES, SHAPE, Studies, geometry


def content(ledger):
    """Everything that an answer is, of every answer."""
    return [ledger.answers.of_image(image, withdrawn=True) for image in ledger.answers.images(withdrawn=True)]


def set_back(studies, copy):
    """The ledger's file as it was when it was copied, with nothing in its write-ahead log."""
    path = studies.ledger.path
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    shutil.copy(copy, path)
    studies.ledger = QueryLedger(path)
    final = studies.folder / "labels" / "final"
    studies.annotations = SubmissionStore(studies.folder / ".patchwise", final, CLASSES, studies.ledger)


def copied(studies, target):
    with sqlite3.connect(studies.ledger.path) as one, sqlite3.connect(target) as other:
        one.backup(other)
    return target


def recover(studies):
    return studies.ledger.recover(studies.folder / ".patchwise" / "raw")


def ask(studies, start):
    asked = [Asked(Region("b", start, (1, 1, 1)), "patch", 0.5, {"why": "unsure"})]
    (query,) = studies.ledger.ask(f"batch {start}", "entropy", 1, asked)
    studies.ledger.leases.lease([query.id], "ann", 60)
    return query.id


def test_what_was_answered_after_the_copy_is_recorded_again(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    query = ask(studies, (1, 2, 3))
    answer = studies.save("b", np.ones(SHAPE), queries=[query], client_id="ann", note="hard to see")
    studies.annotations.withdraw(studies.answers[0], geometry, "ann", "wrong side")
    before, asked = content(studies.ledger), studies.ledger.query(query)
    label = (studies.folder / "labels" / "final" / "b.nii.gz").read_bytes()
    set_back(studies, copy)
    assert content(studies.ledger) != before

    found = recover(studies)
    assert (found.answers, found.switched, found.gone) == ([answer], [studies.answers[0]], [])
    assert content(studies.ledger) == before
    with sqlite3.connect(studies.ledger.path) as connection:
        trail = connection.execute("SELECT kind, client, answer, note FROM events ORDER BY id DESC LIMIT 2").fetchall()
    assert trail == [("withdrawn", None, studies.answers[0], "wrong side"), ("recovered", "ann", answer, None)]
    assert studies.ledger.query(query) == asked
    assert studies.ledger.query(query).status == "answered"
    assert studies.ledger.answers.unmerged() == ["a", "b"]
    images = {name: studies.folder / f"{name}.nii.gz" for name in "ab"}
    assert studies.annotations.repair(images) == ["a", "b"]
    assert (studies.folder / "labels" / "final" / "b.nii.gz").read_bytes() == label
    assert recover(studies).answers == []
    assert studies.annotations.repair(images) == []


def test_agreement_with_another_reader_comes_back(tmp_path):
    studies = Studies(tmp_path / "studies")
    before = studies.ledger.answers.agreements()
    assert before == [
        {
            "image": "a",
            "start": [0, 0, 0],
            "size": [3, 3, 3],
            "answers": [1, 2],
            "clients": ["ann", "ben"],
            "classes": {
                "anterior": {"dice": pytest.approx(2 * 9 / (18 + 9)), "voxels": [18, 9]},
                "posterior": {"dice": None, "voxels": [0, 0]},
            },
        }
    ]
    empty = tmp_path / "empty.sqlite"
    QueryLedger(empty)
    set_back(studies, empty)
    assert recover(studies).answers == [1, 2, 3]
    assert studies.ledger.answers.agreements() == before


def test_the_number_of_a_query_that_somebody_may_hold_is_not_given_again(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    held = ask(studies, (1, 2, 3))
    set_back(studies, copy)
    assert studies.ledger.query(held) is None
    recover(studies)
    assert ask(studies, (0, 0, 0)) == held + 1


def test_without_recovery_the_number_would_be_given_again(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    held = ask(studies, (1, 2, 3))
    set_back(studies, copy)
    assert ask(studies, (0, 0, 0)) == held


def test_an_answer_whose_number_was_taken_meanwhile_gets_another_one(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    query = ask(studies, (1, 2, 3))
    answer = studies.save("b", np.ones(SHAPE), queries=[query], client_id="ann")
    set_back(studies, copy)
    # As a server of an earlier version would have gone on.
    assert ask(studies, (4, 4, 3)) == query
    assert studies.save("b", np.full(SHAPE, 2), queries=[query], client_id="ann") == answer
    raw = studies.ledger.answers.get(answer).raw
    assert recover(studies).answers == [answer + 1]
    (later,) = studies.ledger.answers.get(answer + 1).regions
    assert later == (query + 1, Region("b", (1, 2, 3), (1, 1, 1)))
    assert studies.ledger.answers.get(answer).raw == raw


def test_a_raw_file_that_is_gone_or_changed_is_said(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    answers = [studies.save("b", np.full(SHAPE, value), whole=True, client_id="ann") for value in (1, 2)]
    names = [studies.ledger.answers.get(answer).raw for answer in answers]
    studies.raw(answers[0]).unlink()
    studies.raw(answers[1]).write_bytes(b"short")
    set_back(studies, copy)
    found = recover(studies)
    assert (found.answers, found.gone) == ([], names)


def test_a_folder_older_than_the_journal_and_a_kill_before_its_line_are_made_up_for(tmp_path):
    studies = Studies(tmp_path / "studies")
    studies.annotations.withdraw(studies.answers[0], geometry, "ann")
    before = content(studies.ledger)
    studies.ledger.store.journal.path.unlink()
    assert recover(studies).answers == []
    empty = tmp_path / "empty.sqlite"
    QueryLedger(empty)
    set_back(studies, empty)
    assert recover(studies).switched == [studies.answers[0]]
    assert content(studies.ledger) == before


def test_a_withdrawal_that_only_the_ledger_knows_stands(tmp_path):
    studies = Studies(tmp_path / "studies")
    lines = studies.ledger.store.journal.path.read_bytes()
    studies.annotations.withdraw(studies.answers[0], geometry, "ann")
    studies.ledger.store.journal.path.write_bytes(lines)
    assert recover(studies).switched == []
    assert not studies.ledger.answers.get(studies.answers[0]).active
    assert list(studies.ledger.store.journal.entries())[-1]["active"] is False


def test_a_disk_that_takes_no_line_does_not_refuse_the_answer(tmp_path, caplog):
    studies = Studies(tmp_path / "studies")
    journal = studies.ledger.store.journal.path
    journal.unlink()
    journal.mkdir()
    answer = studies.save("b", np.ones(SHAPE), whole=True, client_id="ann")
    assert studies.ledger.answers.get(answer).client == "ann"
    assert "journal.jsonl: not written" in caplog.text
    journal.rmdir()
    recover(studies)
    assert len([e for e in studies.ledger.store.journal.entries() if "answer" in e]) == 4


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["save", "switch", "copy"]), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 400),
)
def test_whatever_happened_after_any_copy_and_a_torn_last_line_nothing_answered_is_lost(tmp_path_factory, steps, torn):
    studies = Studies(tmp_path_factory.mktemp("world") / "studies")
    copy = copied(studies, studies.folder / "copy.sqlite")
    for step, value in steps:
        answers = [a for image in "ab" for a in studies.ledger.answers.of_image(image, withdrawn=True)]
        if step == "save":
            studies.save("ab"[value % 2], np.full(SHAPE, value % 3), whole=True, client_id="ann")
        elif step == "switch":
            chosen = answers[value % len(answers)]
            change = studies.annotations.withdraw if chosen.active else studies.annotations.restore
            change(chosen.id, geometry, "ann")
        else:
            copied(studies, copy)
    before = content(studies.ledger)
    with open(studies.ledger.store.journal.path, "ab") as file:
        file.write(b'{"answer": {"raw": "x"'[: torn % 23])
    set_back(studies, copy)
    recover(studies)
    assert content(studies.ledger) == before


def test_a_damaged_file_is_told_with_what_to_do(tmp_path):
    studies = Studies(tmp_path / "studies")
    path = studies.ledger.path
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    # The header stays, so that it opens; most of its pages are noise.
    for start in range(4096, len(content) - 4096, 4096):
        content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"(?s)ledger.sqlite is damaged .* the answers come back from journal.jsonl"):
        recover(studies)


def test_a_repeated_request_adds_no_line(tmp_path):
    studies = Studies(tmp_path / "studies")
    query = ask(studies, (1, 2, 3))
    lines = studies.ledger.store.journal.path.read_bytes()
    assert ask(studies, (1, 2, 3)) == query
    assert studies.ledger.store.journal.path.read_bytes() == lines


def test_the_number_of_a_second_reading_is_not_given_again_either(tmp_path):
    studies = Studies(tmp_path / "studies")
    copy = copied(studies, tmp_path / "copy.sqlite")
    asked = [Asked(Region("b", start, (1, 1, 1)), "patch", 0.5, {}) for start in ((1, 2, 3), (4, 2, 3))]
    first, second = studies.ledger.ask("batch", "random", 0, asked, twice=[0, 1])
    # A second reading of each comes after them.
    assert list(studies.ledger.store.journal.entries())[-1] == {"query": second.id + 2}
    set_back(studies, copy)
    recover(studies)
    assert ask(studies, (0, 0, 0)) == first.id + 4


def test_damage_is_told_in_one_line(tmp_path):
    sentence = str(damaged(tmp_path / "ledger.sqlite", "*** in database main ***\nPage 3: never used"))
    assert "\n" not in sentence
    assert "ledger.sqlite is damaged (*** in database main *** Page 3: never used); move it and the files" in sentence
