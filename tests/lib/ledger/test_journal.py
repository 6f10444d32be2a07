# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""An append-only file: added lines persist, also after remains of a full disk or a kill."""

from __future__ import annotations

import pytest

from lib.ledger.journal import Journal


def test_lines_come_back_in_order(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert list(journal.entries()) == []
    journal.append([{"query": 1}, {"query": 2}])
    journal.append([])
    journal.append([{"switch": "a/b", "note": "ä\nö"}])
    assert list(journal.entries()) == [{"query": 1}, {"query": 2}, {"switch": "a/b", "note": "ä\nö"}]


@pytest.mark.parametrize("left", range(1, 12))
def test_a_torn_line_is_passed_over_and_does_not_swallow_the_next(tmp_path, left):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([{"query": 1}, {"query": 2}])
    whole = journal.path.read_bytes()
    with open(journal.path, "r+b") as file:
        file.truncate(len(whole) - left)
    journal.append([{"query": 3}])
    # One byte less is only the line's end.
    expected = [1, 2, 3] if left == 1 else [1, 3]
    assert [entry["query"] for entry in journal.entries()] == expected
    journal.append([{"query": 4}])
    assert [entry["query"] for entry in journal.entries()] == [*expected, 4]


def test_lines_that_are_no_objects_are_passed_over(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.path.write_bytes(b'5\n[1]\n\xff\xfe\n{"query": 7}\n')
    assert list(journal.entries()) == [{"query": 7}]
