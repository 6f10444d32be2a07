# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Files are read once until they change, in this process and in the next."""

from __future__ import annotations

import os

import pytest

from lib.ledger.queries import QueryLedger
from lib.studies.file_cache import FileCache, Stamped


class Reader:
    def __init__(self):
        self.read = []

    def __call__(self, path):
        self.read.append(path.name)
        return {"text": path.read_text()}


@pytest.fixture
def reader():
    return Reader()


@pytest.fixture
def facts(tmp_path, reader):
    def open_facts():
        ledger = QueryLedger(tmp_path / "ledger.sqlite")
        return FileCache(ledger, ":text", reader, lambda fact: fact["text"])

    return open_facts


def files(folder, count):
    for i in range(count):
        path = folder / f"{i}.txt"
        if not path.exists():
            path.write_text(f"text {i}")
    return {str(i): Stamped.of(folder / f"{i}.txt") for i in range(count)}


@pytest.mark.parametrize("count", [1, 20, 450])
def test_a_file_is_read_once(tmp_path, facts, reader, count):
    here = facts()
    expected = {str(i): f"text {i}" for i in range(count)}
    assert here.of(files(tmp_path, count)) == expected
    assert here.of(files(tmp_path, count)) == expected
    assert facts().of(files(tmp_path, count)) == expected
    assert len(reader.read) == count


def test_a_changed_file_is_read_again(tmp_path, facts, reader):
    here = facts()
    here.of(files(tmp_path, 12))
    (tmp_path / "3.txt").write_text("longer than before")
    os.utime(tmp_path / "5.txt", ns=(1, 1))
    found = here.of(files(tmp_path, 12))
    assert (found["3"], found["5"]) == ("longer than before", "text 5")
    assert sorted(reader.read[12:]) == ["3.txt", "5.txt"]
