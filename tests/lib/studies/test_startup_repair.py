# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Start-up recovery: truncated files of every kind, the current model, the ledger's file."""

from __future__ import annotations

import json
import os
import sqlite3
import time

import numpy as np
import pytest
import torch

from lib.ledger.queries import QueryLedger
from lib.ledger.store import LedgerError
from lib.models.checkpoints import ModelStore
from lib.studies.startup_repair import discard_damaged, repair_studies
from tests.eval.answered import Studies
from tests.lib.models.facts import facts


def cut(path, share=0.5):
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    return path


def trained(root, *rounds):
    """A store with one training per round, the last one current."""
    store = ModelStore(root, "net")
    for round_ in rounds:
        digest = str(round_) * 64
        for member in range(2):
            store.save_member(digest, member, {"w": torch.full((50,), float(round_))})
        store.publish(facts(digest, round=round_, members=2))
    return store


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_damaged_model_gives_way_to_the_one_before(tmp_path, share):
    store = trained(tmp_path, 1, 2)
    assert store.repair() is None
    assert store.current().round == 2
    cut(store.member_path("2" * 64, 1), share)
    assert store.repair() == "net: the current model is damaged; that of round 1 is used again"
    assert (store.current().digest, store.current().facts.members) == ("1" * 64, 2)
    assert store.repair() is None


def test_changed_bytes_are_damage_too(tmp_path):
    store = trained(tmp_path, 1, 2)
    path = store.member_path("2" * 64, 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    store.repair()
    assert store.current().round == 1


def test_without_another_model_there_is_none_as_before_the_first_training(tmp_path):
    store = trained(tmp_path, 1)
    store.member_path("1" * 64, 0).unlink()
    assert store.repair() == "net: the only model is damaged and was set aside; train again"
    assert store.current() is None
    assert store.repair() is None


def test_a_cut_pointer_is_written_again_for_the_newest_model(tmp_path):
    store = trained(tmp_path, 1, 2)
    known = store.current().facts
    cut(tmp_path / "net" / "current.json")
    assert "that of round 2 is used again" in store.repair()
    assert store.current().facts == known


def test_a_model_of_before_digests_were_noted_is_judged_by_its_archives(tmp_path):
    store = trained(tmp_path, 1)
    (tmp_path / "net" / ("1" * 16) / "facts.json").unlink()
    assert store.repair() is None
    cut(store.member_path("1" * 64, 0))
    assert store.repair() == "net: the only model is damaged and was set aside; train again"


def test_members_that_were_cut_short_are_trained_again(tmp_path):
    store = trained(tmp_path, 1)
    assert store.finished_members("1" * 64, 3) == [0, 1]
    cut(store.member_path("1" * 64, 0))
    assert store.finished_members("1" * 64, 3) == [1]


@pytest.mark.parametrize("share", [0, 0.2, 0.9])
def test_cut_caches_are_removed_and_whole_ones_stay(tmp_path, share):
    (tmp_path / "moments" / "abc").mkdir(parents=True)
    whole, broken = (tmp_path / "moments" / "abc" / name for name in ("1.npz", "2.npz"))
    for path in (whole, broken):
        np.savez(path, mean=np.zeros(1000))
    cut(broken, share)
    tables = [tmp_path / "moments" / "abc" / "summaries.sqlite", tmp_path / "measures.sqlite"]
    for path in tables:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (content TEXT)")
            connection.executemany("INSERT INTO t VALUES (?)", [("x" * 900,)] * 50)
        connection.close()
    cut(tables[1], 0.2)
    assert discard_damaged([tmp_path / "moments", tmp_path / "measures.sqlite", tmp_path / "none"]) == [
        broken,
        tables[1],
    ]
    assert [path.exists() for path in (whole, broken, *tables)] == [True, False, True, False]


def test_an_empty_or_tiny_table_file_is_told_from_a_cut_one(tmp_path):
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "tiny.sqlite").write_bytes(b"SQLite format 3\0")
    assert discard_damaged([tmp_path]) == [tmp_path / "tiny.sqlite"]


def test_a_start_says_what_it_has_mended_and_the_next_one_nothing(tmp_path):
    studies = Studies(tmp_path / "studies")
    state, images = studies.annotations.state, {name: studies.folder / f"{name}.nii.gz" for name in "ab"}
    store = trained(state / "models", 1, 2)
    cut(store.member_path("2" * 64, 0))
    cut(studies.label)
    with sqlite3.connect(studies.ledger.path) as ledger:
        ledger.execute("DELETE FROM answered WHERE answer = 3")
        ledger.execute("DELETE FROM answers WHERE id = 3")
    assert list(repair_studies(studies.annotations, images, [store])) == [
        "the ledger had lost records of answers 3; they were restored from the journal",
        "labels of a were rebuilt from the raw answers after an interruption",
        "net: the current model is damaged; that of round 1 is used again",
    ]
    assert list(repair_studies(studies.annotations, images, [store])) == []


def test_old_unfinished_files_are_removed_and_those_at_work_stay(tmp_path):
    studies = Studies(tmp_path / "studies")
    final, raw = studies.annotations.merged, studies.annotations.state / "raw" / "a"
    old, new = [final / ".tmp-1-a.nii.gz", raw / ".tmp-2-b.nii.gz"], [final / ".tmp-3-a.nii.gz"]
    for path in (*old, *new):
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (time.time() - 3700,) * 2)
    said = list(repair_studies(studies.annotations, {}, []))
    assert said == ["2 unfinished files of interrupted writers were removed"]
    assert [path.exists() for path in (*old, *new)] == [False, False, True]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_ledger_that_was_cut_short_is_said_and_comes_back_from_the_journal(tmp_path, share):
    studies = Studies(tmp_path / "studies")
    path, raw = studies.ledger.path, studies.annotations.state / "raw"
    before = [studies.ledger.answers.of_image(image) for image in "ab"]
    cut(path, share)
    with pytest.raises(LedgerError, match=r"ledger.sqlite is damaged .* move it .* come back from journal.jsonl"):
        QueryLedger(path).recover(raw)
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    ledger = QueryLedger(path)
    ledger.recover(raw)
    assert [ledger.answers.of_image(image) for image in "ab"] == before


def test_the_pointer_names_what_was_published(tmp_path):
    trained(tmp_path, 3)
    written = json.loads((tmp_path / "net" / "current.json").read_text())
    assert written == facts("3" * 64, round=3, members=2).model_dump(mode="json")
