# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval backup STUDIES FOLDER`: copy of all data that cannot be derived, while the server is in use."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eval.app_path import add_app
from eval.app_tools.project import LEDGER, copy_ledger
from eval.errors import RefereeError

# The server creates them again: moments by scoring, locks at once.
_SKIPPED = frozenset({"moments", "locks"})


@dataclass(frozen=True)
class Backup:
    """Place and content of a backup."""

    folder: Path
    answers: int
    labels: int
    bytes: int

    def text(self) -> str:
        return (
            f"{self.folder}: {self.answers} answers, {self.labels} labels without an answer, "
            f"{self.bytes / 2**20:.1f} MiB, every raw file as the ledger has it"
        )


def backup(studies: Path, folder: Path) -> Backup:
    """Copy the journal, the ledger and then its files, and compare digests; images are not copied.

    A raw file is on disk before the ledger records it and is never changed, so all files of an earlier copy of the
    ledger exist. The journal gets its line after the ledger. Its copy is taken first and thus contains no answer that
    the ledger's copy lacks; the next start adds the lines that it lacks itself. Labels of answered images are left out:
    the server rebuilds missing ones from the raw answers, so they cannot contradict the ledger.

    Raises:
        RefereeError: there is no ledger, `folder` exists, or a raw file is missing or differs from the submission.
    """
    add_app()
    from lib.ledger.store import JOURNAL

    if not (studies / LEDGER).is_file():
        raise RefereeError(f"{studies}: no {LEDGER} there; name the studies folder that the server runs on")
    if folder.exists():
        raise RefereeError(f"{folder} exists; a backup is never written over something: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    try:
        (partial / LEDGER).parent.mkdir()
        _copy(studies / LEDGER.with_name(JOURNAL), partial / LEDGER.with_name(JOURNAL))
        copy_ledger(studies / LEDGER, partial / LEDGER)
        _copy_models(studies / LEDGER.parent, partial / LEDGER.parent)
        for path in sorted((studies / LEDGER.parent).iterdir()):
            if path.name not in (*_SKIPPED, "models", JOURNAL) and not path.name.startswith(LEDGER.name):
                _copy(path, partial / LEDGER.parent / path.name)
        if (studies / "dataset.json").is_file():
            _copy(studies / "dataset.json", partial / "dataset.json")
        answers, labels = _check_answers(partial), _copy_labels(studies, partial)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        os.sync()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Backup(folder, answers, labels, size)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder; files that are incomplete or vanish during the copy are not in the ledger."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if not path.name.startswith(".tmp-"):
                _copy(path, target / path.name)
        return
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        target.unlink(missing_ok=True)


def _copy_models(state: Path, target: Path) -> None:
    """Copy the current model of every bundle; older ones and unfinished trainings are not needed."""
    from lib.models.checkpoints import ModelStore
    from lib.storage.atomic_files import write_json

    for folder in sorted((state / "models").iterdir()) if (state / "models").is_dir() else []:
        model = ModelStore(state / "models", folder.name).current()
        if model:
            copied = target / "models" / folder.name
            copied.mkdir(parents=True)
            _copy(model.folder, copied / model.folder.name)
            write_json(copied / "current.json", model.facts.model_dump(mode="json"))


def _check_answers(copy: Path) -> int:
    """Number of answers, after a check that all raw files exist."""
    from lib.ledger.queries import QueryLedger
    from lib.storage.atomic_files import file_digest

    ledger, checked = QueryLedger(copy / LEDGER), 0
    for image in ledger.answers.images(withdrawn=True):
        for answer in ledger.answers.of_image(image, withdrawn=True):
            raw = copy / LEDGER.parent / "raw" / answer.raw
            if not raw.is_file() or file_digest(raw) != answer.raw_sha256:
                problem = "differs from the submission" if raw.is_file() else "is missing"
                raise RefereeError(f"raw/{answer.raw}, answer {answer.id}, {problem}; run `python -m eval audit`")
            checked += 1
    return checked


def _copy_labels(studies: Path, copy: Path) -> int:
    """Number of labels that no answer made."""
    from lib.ledger.queries import QueryLedger
    from lib.storage.volumes import EXTENSIONS

    answered, copied = set(QueryLedger(copy / LEDGER).answers.images(withdrawn=True)), 0
    for path in sorted((studies / "labels").glob("*/*")):
        extension = next((e for e in EXTENSIONS if path.name.endswith(e)), None)
        final = path.parent.name == "final"
        if extension and not path.name.startswith(".") and not (final and path.name[: -len(extension)] in answered):
            target = copy / "labels" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target)
            copied += final
    return copied
