# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Start-up recovery: files that a kill, a full disk or a power cut left behind are brought in line with the ledger."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lib.models.checkpoints import ModelStore
from lib.storage.atomic_files import remove_unfinished
from lib.studies.submissions import SubmissionStore

_PAGE_SIZE_AT, _PAGES_AT, _HEADER = 16, 28, 100
_LARGEST_PAGE = 65536
# A training of the previous server process may still be writing.
_HOURS = 1.0


def repair_studies(
    annotations: SubmissionStore, images: Mapping[str, Path], models: Iterable[ModelStore]
) -> Iterator[str]:
    """Repair ledger and journal, then labels from raw answers, then models and caches; yield a sentence per repair.

    Raises:
        LedgerError: SQLite cannot repair the ledger's file.
        ImageError: a raw file that a label needs is missing or changed.
    """
    state = annotations.state
    found = annotations.ledger.recover(state / "raw")
    if found.answers or found.switched:
        numbers = ", ".join(map(str, sorted({*found.answers, *found.switched})))
        yield f"the ledger had lost records of answers {numbers}; they were restored from the journal"
    if found.gone:
        yield f"answers that the ledger lost have no raw file: {', '.join(found.gone)}; restore a backup"
    repaired = annotations.repair(images)
    if repaired:
        yield f"labels of {', '.join(repaired)} were rebuilt from the raw answers after an interruption"
    for store in models:
        if sentence := store.repair():
            yield sentence
    for path in discard_damaged([state / "moments", state / "proposals", state / "measures.sqlite"]):
        yield f"{path} was cut short and is made again"
    removed = sum(remove_unfinished(folder, _HOURS) for folder in (state, annotations.merged.parent))
    if removed:
        yield f"{removed} unfinished files of interrupted writers were removed"


def discard_damaged(folders: list[Path]) -> list[Path]:
    """Remove truncated archives and SQLite files that are shorter than their headers declare; return their paths.

    For start-up: only the ends of files are read.
    """
    damaged = [path for folder in folders for path in _caches(folder) if not _is_whole(path)]
    for path in damaged:
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)
    return damaged


def _caches(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
    elif folder.is_dir():
        yield from (path for path in sorted(folder.rglob("*")) if path.suffix in (".npz", ".sqlite"))


def _is_whole(path: Path) -> bool:
    return zipfile.is_zipfile(path) if path.suffix == ".npz" else _holds_its_pages(path)


def _holds_its_pages(path: Path) -> bool:
    """Return whether an SQLite file has the length that its header declares (file format, section 1.3)."""
    with open(path, "rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER:
        # An empty file is a database without tables; its content is still in its log, if anywhere.
        return not header
    (page_size,) = struct.unpack_from(">H", header, _PAGE_SIZE_AT)
    (pages,) = struct.unpack_from(">I", header, _PAGES_AT)
    return bool(path.stat().st_size >= pages * (_LARGEST_PAGE if page_size == 1 else page_size))
