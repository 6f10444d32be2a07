# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""How errors of the core leave the server: one sentence and a 4xx status, or exit code 2 in a child process."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fastapi import HTTPException

from lib.ledger.store import LedgerError
from lib.models.plan import PlanError
from lib.models.recipe import RecipeError
from lib.options import OptionError
from lib.partial_labels import LabelError
from lib.querying.methods import MethodError
from lib.storage.volume_headers import ImageError


class PacsError(RuntimeError):
    """A DICOMweb server did not do as asked; the message names it and says what to do."""

    status = 503


# Errors whose text is written for the person who made the request.
SPEAKING = (ImageError, LabelError, LedgerError, MethodError, OptionError, PacsError, PlanError, RecipeError)


def status_of(error: Exception) -> int:
    """The status of an error in `SPEAKING`: 4xx, or 503 where another server is missing."""
    return int(getattr(error, "status", 400))


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


def storage_problem(error: Exception) -> str | None:
    """What to tell somebody whose request failed because the disk takes nothing; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    said = str(error) if isinstance(error, sqlite3.OperationalError) else ""
    if number in _NO_ROOM or "full" in said:
        return "the server's disk is full, so nothing was changed or only a part; free space there and send this again"
    if number in _NO_WRITING or "readonly" in said or "unable to open" in said or "disk I/O" in said:
        return f"the server cannot write to its studies folder ({error}); make it writable and send this again"
    return None


def refuse(sentence: str, status: int = 400) -> NoReturn:
    """Ends a request with a 4xx status and one sentence."""
    raise HTTPException(status_code=status, detail=sentence)


@contextmanager
def speaking_errors() -> Iterator[None]:
    """Turns the errors of the core into 4xx answers that carry their sentence."""
    try:
        yield
    except SPEAKING as error:
        raise HTTPException(status_code=status_of(error), detail=str(error)) from error
