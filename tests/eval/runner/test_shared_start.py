# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import pandas as pd

from eval.protocol.study import load_study
from eval.runner.run import Options, start_run
from eval.runner.shared_start import SharedStart

DIGEST = "0123456789abcdef" * 4


def models(cell):
    return cell / "studies" / ".patchwise" / "models" / "net" / DIGEST[:16]


def trained(cell):
    folder = models(cell)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("member_0.pt", "member_0.head.pt", "member_1.pt", "member_1.unfinished.pt"):
        (folder / name).write_text(f"{name} of {cell.name}")


def test_the_first_cell_lends_finished_members_to_the_others(tmp_path):
    first, second = (tmp_path / "cells" / f"{name}_s1" for name in ("random", "bald"))
    start = SharedStart(first, 1, "net")
    assert start.borrowed == set()
    trained(first)
    assert start.keep(DIGEST) is False
    start = SharedStart(second, 1, "net")
    assert sorted(p.name for p in models(second).iterdir()) == ["member_0.head.pt", "member_0.pt", "member_1.pt"]
    assert models(second).joinpath("member_1.pt").read_text() == "member_1.pt of random_s1"
    assert start.keep(DIGEST) is True
    assert SharedStart(second, 1, "net").keep(DIGEST) is True  # resumed after a kill, it is still the other's work
    assert start.keep("f" * 64) is False  # trained on other labels: the linked files are not its own


def test_another_seed_borrows_nothing_and_what_is_there_stays(tmp_path):
    first, other, mine = (tmp_path / "cells" / name for name in ("random_s1", "random_s2", "bald_s1"))
    trained(first)
    SharedStart(first, 1, "net").keep(DIGEST)
    assert SharedStart(other, 2, "net").borrowed == set()
    assert not models(other).exists()
    trained(mine)
    SharedStart(mine, 1, "net").keep(DIGEST)
    assert models(mine).joinpath("member_0.pt").read_text() == "member_0.pt of bald_s1"
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_seconds_of_borrowed_trainings_are_left_empty(write_study, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(SharedStart, "keep", lambda self, digest: "random" not in str(self.models))
    start_run(load_study(write_study()), tmp_path / "out", Options(quiet=True))
    rounds = pd.read_csv(tmp_path / "out" / "rounds.csv")
    empty = rounds[rounds["train_s"].isna()]
    assert set(empty["round"]) == {0}
    assert set(empty["method"]) == set(rounds["method"]) - {"random"}
    assert set(empty["method"])
