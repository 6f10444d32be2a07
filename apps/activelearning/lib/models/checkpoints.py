# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Trained ensembles on disk: whole or absent, and addressed by the digest of their training data and options."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lib.errors import PatchwiseError
from lib.models.facts import ModelFacts
from lib.models.recipe import Bundle
from lib.options import problems
from lib.storage.atomic_files import file_digest, read_json, write_atomic, write_json

KEPT_TRAININGS = 2
_FACTS = "facts.json"


class FactsError(PatchwiseError):
    """The facts of a training cannot be read."""


@dataclass(frozen=True)
class Model:
    """A finished training: the folder of its checkpoints and its facts."""

    folder: Path
    facts: ModelFacts

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def round(self) -> int:
        return self.facts.round


class ModelStore:
    """Checkpoints of one bundle: `<root>/<bundle>/<digest>/member_<i>.pt`, and `current.json` that names the newest.

    A member on disk is complete, so an interrupted training continues with the next one. `current.json` changes only
    when all members are complete.
    """

    def __init__(self, root: Path, bundle: str) -> None:
        self.folder = root / bundle
        self.bundle = bundle

    def member_path(self, digest: str, member: int) -> Path:
        """File of one member of a training."""
        return self.folder / digest[:16] / f"member_{member}.pt"

    def head_path(self, digest: str, member: int) -> Path:
        """File of the head that predicts a member's losses; absent where it was trained without one."""
        return self.folder / digest[:16] / f"member_{member}.head.pt"

    def checkpoint_path(self, digest: str, member: int) -> Path:
        """Checkpoint from which an unfinished member continues."""
        return self.folder / digest[:16] / f"member_{member}.unfinished.pt"

    def save_member(
        self, digest: str, member: int, weights: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store a finished member; its own file is written last, so that it exists only if the others do."""
        if head is not None:
            write_atomic(self.head_path(digest, member), lambda stream: torch.save(dict(head), stream))
        write_atomic(self.member_path(digest, member), lambda stream: torch.save(dict(weights), stream))

    def finished_members(self, digest: str, members: int) -> list[int]:
        """Members of a training that are on disk and whole."""
        return [member for member in range(members) if zipfile.is_zipfile(self.member_path(digest, member))]

    def publish(self, facts: ModelFacts) -> Model:
        """Make a training the current one and remove all but the newest few."""
        folder, written = self.folder / facts.digest[:16], facts.model_dump(mode="json")
        files = {path.name: file_digest(path) for path in sorted(folder.glob("member_*.pt"))}
        # What `repair` needs to make this training the current one again, should a newer one be damaged.
        write_json(folder / _FACTS, {"facts": written, "files": files})
        write_json(self.folder / "current.json", written)
        for old in self._folders()[KEPT_TRAININGS:]:
            if old.name != folder.name:
                shutil.rmtree(old, ignore_errors=True)
        return Model(folder, facts)

    def current(self) -> Model | None:
        """The newest finished training, or None before the first.

        Raises:
            FactsError: the file does not hold the facts of a training.
        """
        path = self.folder / "current.json"
        found = read_json(path)
        if not found:
            return None
        try:
            facts = ModelFacts.model_validate(found)
        except ValidationError as error:
            raise FactsError(f"{path}: expected the facts of a training, got {problems(error)}; train again") from error
        return Model(self.folder / facts.digest[:16], facts)

    def repair(self) -> str | None:
        """Return to the newest intact training if the current one is damaged; return a sentence for the log.

        For start-up recovery: every checkpoint of the current training is read and compared with its digest.
        """
        pointer = self.folder / "current.json"
        if not pointer.is_file():
            return None
        model = _tolerant(pointer)
        if model and _is_whole(self.folder / str(model.get("digest"))[:16]):
            return None
        for folder in self._folders():
            if (folder / _FACTS).is_file() and _is_whole(folder):
                facts = _tolerant(folder / _FACTS)["facts"]
                write_json(pointer, facts)
                return f"{self.bundle}: the current model is damaged; that of round {facts['round']} is used again"
        pointer.unlink()
        return f"{self.bundle}: the only model is damaged and was set aside; train again"

    def _folders(self) -> list[Path]:
        """Folders of trainings, newest first."""
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def _tolerant(path: Path) -> dict[str, Any]:
    """Content of a JSON file that may be missing or cut short; empty then."""
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_whole(folder: Path) -> bool:
    """Return whether every checkpoint of a finished training has its published digest."""
    files = _tolerant(folder / _FACTS).get("files")
    if files is None:
        # Trained before digests were recorded: a truncated file lacks the end of its archive.
        members = list(folder.glob("member_*.pt"))
        return bool(members) and all(zipfile.is_zipfile(path) for path in members)
    return all((folder / name).is_file() and file_digest(folder / name) == sha for name, sha in files.items())


def trained_bundle(model: Model | None, bundle: Bundle) -> Bundle:
    """The bundle with the plan of the training of `model`, which may differ from the present plan."""
    plan = model.facts.plan if model else None
    return bundle.planned(plan) if plan else bundle


def choose_device(wanted: str) -> torch.device:
    """`auto` takes a GPU when there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)
