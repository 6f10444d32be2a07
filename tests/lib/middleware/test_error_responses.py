# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Error responses for a full or read-only disk."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from lib.middleware.error_responses import storage_problem

FULL = "the server's disk is full, so nothing was changed or only a part; free space there and send this again"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room(number):
    assert storage_problem(OSError(number, "no")) == FULL
    assert storage_problem(sqlite3.OperationalError("database or disk is full")) == FULL


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EPERM, "Operation not permitted", "/data/raw"), "not permitted: '/data/raw'"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "attempt to write a readonly database"),
        (sqlite3.OperationalError("unable to open database file"), "unable to open database file"),
        (sqlite3.OperationalError("disk I/O error"), "disk I/O error"),
    ],
)
def test_no_writing(error, said):
    sentence = storage_problem(error)
    assert sentence.startswith("the server cannot write to its studies folder (")
    assert sentence.endswith("; make it writable and send this again")
    assert said in sentence


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ECONNRESET, "reset"), FileNotFoundError("x"), ValueError("full"), sqlite3.OperationalError("x")],
)
def test_other_errors_are_not_explained_by_the_disk(error):
    assert storage_problem(error) is None
