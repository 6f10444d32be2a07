# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval audit STUDIES`: check the labels on disk against the raw answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.app_tools.project import LEDGER, open_annotations

if TYPE_CHECKING:
    from lib.ledger.records import Answer
    from lib.studies.submissions import SubmissionStore


@dataclass
class Audit:
    """Result of a comparison: counts, and one `{"file", "problem"}` per finding.

    `unreferenced` are raw files without an answer, from submissions whose recording was interrupted. They are kept and
    do not count as a problem.
    """

    studies: str
    images: int = 0
    answers: int = 0
    withdrawn: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    unreferenced: list[str] = field(default_factory=list)

    def wrong(self, file: Path | str, problem: str) -> None:
        self.problems.append({"file": str(file), "problem": problem})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def audit(studies: Path, verified: dict[str, tuple[Any, ...]] | None = None) -> Audit:
    """Rebuild every label from the raw answers and compare; nothing in the folder is changed.

    `verified` records the correct labels, image by image. Passed again, a label is not rebuilt while its file and all
    its sources are unchanged. Raw files are read every time.

    Raises:
        RefereeError: no such folder, no ledger in it, or one that cannot be read.
    """
    found = Audit(str(studies))
    with open_annotations(studies) as annotations:
        _check_all(found, studies, annotations, {} if verified is None else verified)
    return found


def _check_all(found: Audit, studies: Path, annotations: SubmissionStore, verified: dict[str, tuple[Any, ...]]) -> None:
    from lib.storage.volumes import EXTENSIONS

    ledger, folder = annotations.ledger, annotations.merged
    answered = ledger.answers.images(withdrawn=True)
    named: set[str] = set()
    for image in answered:
        answers = ledger.answers.of_image(image, withdrawn=True)
        named |= {answer.raw for answer in answers}
        _check_raw(found, annotations, answers)
        _check_label(found, studies, annotations, image, [a for a in answers if a.active], verified)
    _check_journal(found, studies, named)
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        extension = next((e for e in EXTENSIONS if file.name.endswith(e)), None)
        if extension and not file.name.startswith(".") and file.name[: -len(extension)] not in answered:
            found.wrong(file, "no recorded answer made this label; it is recorded when its image is answered first")
    raw = annotations.state / "raw"
    files = {str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file() and not p.name.startswith(".")}
    found.unreferenced = sorted(files - named)


def _check_raw(found: Audit, annotations: SubmissionStore, answers: Sequence[Answer]) -> None:
    """Every raw file, of withdrawn answers too: these may be restored."""
    from lib.storage.atomic_files import file_digest

    for answer in answers:
        found.answers += 1
        found.withdrawn += not answer.active
        path = annotations.state / "raw" / answer.raw
        if not path.is_file():
            found.wrong(path, f"the raw file of answer {answer.id} is missing")
        elif file_digest(path) != answer.raw_sha256:
            found.wrong(path, f"the raw file of answer {answer.id} differs from the submission")


def _check_journal(found: Audit, studies: Path, named: set[str]) -> None:
    """Answers that the ledger has lost; it is a copy that is read here, and the journal lies beside the original."""
    from lib.ledger.journal import Journal
    from lib.ledger.store import JOURNAL

    path = studies / LEDGER.with_name(JOURNAL)
    lost = {entry["answer"]["raw"]: entry["answer"]["id"] for entry in Journal(path).entries() if "answer" in entry}
    for raw in sorted(lost.keys() - named):
        found.wrong(path, f"answer {lost[raw]} ({raw}) is not in the ledger; a start of the server records it again")


def _check_label(
    found: Audit,
    studies: Path,
    annotations: SubmissionStore,
    image: str,
    answers: Sequence[Answer],
    verified: dict[str, tuple[Any, ...]],
) -> None:
    from lib.partial_labels import LabelError
    from lib.storage.atomic_files import file_digest
    from lib.storage.volume_headers import ImageError
    from lib.storage.volumes import EXTENSIONS, image_grid, load_label

    found.images += 1
    folder = annotations.merged
    path = next((p for p in (folder / f"{image}{e}" for e in EXTENSIONS) if p.is_file()), folder / f"{image}.nii.gz")
    if not answers:
        if path.is_file():
            found.wrong(path, "all answers to its image have been withdrawn, so there should be no label")
        return
    source = next((p for p in (studies / f"{image}{e}" for e in EXTENSIONS) if p.is_file()), None)
    if source is None:
        found.wrong(studies / f"{image}.nii.gz", "the image of recorded answers is missing")
        return
    if not path.is_file():
        found.wrong(path, "the label is missing; the server makes it again when it starts or the image is answered")
        return
    made_of = (source.stat().st_mtime_ns, file_digest(path), *answers)
    if verified.get(image) == made_of:
        return
    try:
        grid = image_grid(source, image)
        label = load_label(path, grid)
        rebuilt_xyz = annotations.rebuilt(image, grid.shape)
    except (ImageError, LabelError) as error:
        found.wrong(path, f"it cannot be compared: {error}")
        return
    differing = int(np.count_nonzero(label.array_xyz != rebuilt_xyz))
    if differing:
        found.wrong(path, f"{differing} voxels differ from the rebuild from the raw answers")
    else:
        verified[image] = made_of


def audit_text(found: Audit) -> str:
    """Text of the findings, one line per problem."""
    lines = [f"{row['file']}: {row['problem']}" for row in found.problems]
    lines += [f"note: raw file {name} belongs to no recorded answer" for name in found.unreferenced]
    lines.append(
        f"{found.images} labels from {found.answers} answers ({found.withdrawn} withdrawn): "
        + (f"{len(found.problems)} problems" if found.problems else "all equal the rebuild from the raw answers")
    )
    return "\n".join(lines)


def audit_json(found: Audit) -> str:
    """The findings as JSON."""
    return json.dumps(found.to_json(), indent=1)
