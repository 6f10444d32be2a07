# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A studies folder opened for reading, beside a server at work: a copy of its ledger, its classes and raw answers."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eval.app_path import add_app
from eval.errors import RefereeError

if TYPE_CHECKING:
    from lib.studies.submissions import SubmissionStore

LEDGER = Path(".patchwise") / "ledger.sqlite"


@contextmanager
def open_annotations(studies: Path) -> Iterator[SubmissionStore]:
    """Submissions of a project, read from a copy of its ledger; nothing in the folder is changed.

    Raises:
        RefereeError: no such folder, no ledger in it, or one that cannot be read.
    """
    path = studies / LEDGER
    if not path.is_file():
        raise RefereeError(f"{studies}: no {LEDGER} there; name the studies folder that the server runs on")
    add_app()
    from lib.ledger.queries import QueryLedger
    from lib.ledger.store import LedgerError
    from lib.models.class_names import unlabelled_values
    from lib.options import OptionError
    from lib.studies.submissions import SubmissionStore

    with tempfile.TemporaryDirectory() as folder:
        try:
            ledger = QueryLedger(copy_ledger(path, Path(folder) / "ledger.sqlite"))
            classes = ledger.get_meta("classes") or _from_dataset(studies)
            ignored = unlabelled_values(studies)
            yield SubmissionStore(studies / LEDGER.parent, studies / "labels" / "final", classes, ledger, ignored)
        except (LedgerError, sqlite3.DatabaseError) as error:
            raise RefereeError(f"{path}: {error}") from error
        except OptionError as error:
            raise RefereeError(str(error)) from error


def copy_ledger(source: Path, target: Path) -> Path:
    """A consistent copy of the ledger, also while a server writes to it; opening it may migrate it."""
    with sqlite3.connect(source) as one, sqlite3.connect(target) as other:
        one.backup(other)
    one.close()
    other.close()
    return target


def _from_dataset(studies: Path) -> dict[str, int]:
    from lib.models.class_names import resolve_classes
    from lib.options import OptionError

    try:
        return resolve_classes({}, studies, {})
    except OptionError as error:
        raise RefereeError(f"{error}; or start the server once, which notes its class names") from error
